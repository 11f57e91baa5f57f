import numpy as np
import pytest

from tracin_beam.scoring import methods

RATES = (0.5, 0.25, 0.1)


@pytest.fixture
def parts():
    rng = np.random.default_rng(0)
    train = [rng.normal(size=(7, 16)).astype(np.float32) for _ in RATES]
    test = [rng.normal(size=(4, 16)).astype(np.float32) for _ in RATES]
    return train, test


def looped(train, test, transforms=None):
    """Σ_c η_c ⟨z_c, T_c z'_c⟩ one pair at a time, in float64."""
    scores = np.zeros((4, 7))
    for c, rate in enumerate(RATES):
        for q in range(4):
            query = test[c][q].astype(np.float64)
            if transforms is not None:
                query = transforms[c] @ query
            for i in range(7):
                scores[q, i] += rate * float(np.sum(query * train[c][i].astype(np.float64)))
    return scores


def rooted(score, parts):
    return np.hstack([root * part for root, part in zip(score.roots, parts, strict=True)])


def test_all_that_estimates_gives_the_same_score(parts):
    train, test = parts
    score = methods.make("TracInCP", RATES)
    expected = looped(train, test)
    products = np.stack([b @ a.T for a, b in zip(train, test, strict=True)], axis=2)
    ways = [
        score.estimates(score.queries(np.hstack(test)), np.hstack(train)),
        score.query_rows(np.hstack(test)) @ rooted(score, train).T,
        score.by_checkpoint(products).sum(axis=2),
    ]
    for found in ways:
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert score.by_checkpoint(products).dtype == np.float64


def test_a_method_may_transform_the_query(parts, monkeypatch):
    train, test = parts
    transforms = np.random.default_rng(1).normal(size=(3, 16, 16))
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))

    @methods.method("preconditioned")
    class Preconditioned(methods.TracInCP):
        def of_embeddings(self, checkpoint, embedding):
            return (embedding @ transforms[checkpoint].T).astype(np.float32)

    assert {"TracInCP", "preconditioned"} <= set(methods.names())
    score = methods.make("preconditioned", RATES)
    expected = looped(train, test, transforms)
    found = score.estimates(score.queries(np.hstack(test)), np.hstack(train))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    found = score.query_rows(np.hstack(test)) @ rooted(score, train).T
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
