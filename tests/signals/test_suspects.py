"""Who stands out by where it lies: what was planted is found, and clean data is quiet."""

import numpy as np
import pytest

from tracin_beam.signals import neighbours, suspects

K = neighbours.COUNT


def look(x):
    nearest = neighbours.Nearest(x, K)
    nearest.add(x, 0, np.arange(len(x)), np.arange(len(x)))
    found = nearest.found
    mean = found.distance.mean(axis=1).astype(np.float64)
    close = suspects.closeness(found.distance[:, 0], found.distance[:, -1], K)
    out = neighbours.outlyingness(found.distance, mean[found.row])
    return close, suspects.outlier_rates(mean, out)


def near(close):
    return set(np.flatnonzero(close.ratio <= close.limit).tolist())


def clean(rng, name):
    if name == "clusters":
        centres = 10 * rng.normal(size=(3, 8))
        spread = np.array([1.0, 0.3, 3.0])
        of = rng.integers(3, size=900)
        return centres[of] + spread[of, None] * rng.normal(size=(900, 8))
    if name == "plane":  # of two dimensions, in many
        return rng.normal(size=(900, 2)) @ rng.normal(size=(2, 30))
    return np.exp(rng.normal(size=(900, 5)))


@pytest.mark.parametrize("name", ["clusters", "plane", "skewed"])
def test_planted_are_found_and_clean_data_is_quiet(name):
    rng = np.random.default_rng(5)
    x = clean(rng, name).astype(np.float32)
    close, rates = look(x)
    assert not near(close)
    assert (rates <= suspects.OUTLIER_LEVEL).sum() <= 4
    again = rng.choice(900, 20, replace=False)
    copies = x[again] + 1e-4 * x.std() * rng.normal(size=(20, x.shape[1]))
    far = x.mean(axis=0) + 300 * x.std() * rng.normal(size=(3, x.shape[1]))
    close, rates = look(np.concatenate([x, copies, far]).astype(np.float32))
    planted = set(again.tolist()) | set(range(900, 920))
    assert planted <= near(close)
    assert len(near(close) - planted) <= 2
    assert (rates[920:] <= suspects.OUTLIER_LEVEL).all()
    assert (rates[:920] <= suspects.OUTLIER_LEVEL).sum() <= 4


def test_the_dimension_of_a_plane():
    close, _ = look(clean(np.random.default_rng(1), "plane").astype(np.float32))
    assert close.dimension == pytest.approx(2, abs=0.3)


def test_features_that_are_all_alike_say_nothing():
    close, rates = look(np.ones((50, 4), np.float32))
    assert not near(close)
    assert (rates == 1).all()


def test_false_discovery_rates():
    np.testing.assert_allclose(
        suspects.adjusted(np.array([0.01, 0.5, 0.02, 0.9])), [0.04, 2 / 3, 0.04, 0.9]
    )


def sums(rng, shards, size, moved=None, dim=32):
    found = []
    centres = 5 * np.random.default_rng(0).normal(size=(3, dim))
    for shard in range(shards):
        label = rng.integers(3, size=size).astype(float)
        x = centres[label.astype(int)] + rng.normal(size=(size, dim))
        if moved is not None and shard == moved[0]:
            x[label == moved[1]] += moved[2]
        found.append(suspects.class_sums(x, label))
    return found


def test_a_class_that_has_moved():
    rng = np.random.default_rng(7)
    assert sum(len(suspects.shifted(sums(rng, 6, 300))) for _ in range(20)) <= 1
    (found,) = suspects.shifted(sums(rng, 6, 300, moved=(4, 1, 0.5)))
    assert (found.shard, found.label) == (4, 1.0)
    assert 0 < found.score < 1
    # Of two, the smaller one.
    (found,) = suspects.shifted(sums(rng, 2, 300, moved=(0, 2, 1.0)))
    assert found.label == 2.0
    # Where shards always differ, no one does.
    everywhere = []
    for _ in range(8):
        label = np.zeros(300)
        x = rng.normal(size=(300, 32)) + rng.normal(size=32)
        everywhere.append(suspects.class_sums(x, label))
    assert not suspects.shifted(everywhere)
