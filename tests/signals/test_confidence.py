"""Stated confidence against flips of known rate."""

import numpy as np
import pytest

from tracin_beam.signals import confidence


def softmax(x):
    grown = np.exp(x - x.max(axis=1, keepdims=True))
    return grown / grown.sum(axis=1, keepdims=True)


def planted(rate, confusable, n=6000, classes=4):
    """Evidence that is less sharp than it ought to be, given labels, and which are wrong."""
    rng = np.random.default_rng(0)
    truth = softmax(rng.normal(scale=4, size=(n, classes)))
    true = (truth.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1).clip(max=classes - 1)
    wrong = rng.random(n) < rate
    other = np.ones(n, int) if confusable else rng.integers(1, classes, n)
    given = np.where(wrong, (true + other) % classes, true)
    return softmax(np.log(truth) / 2), given, wrong


@pytest.mark.parametrize("confusable", [False, True])
@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3])
def test_confidence_is_the_share_that_is_wrong(rate, confusable):
    evidence, given, wrong = planted(rate, confusable)
    noise = confidence.noise(evidence, given)
    assert noise.sharpness == pytest.approx(2, rel=0.2)
    np.testing.assert_allclose(1 - np.diag(noise.rates), rate, atol=0.04)
    found = confidence.wrong(evidence, given, noise)
    assert found.mean() == pytest.approx(wrong.mean(), abs=0.02)
    score = 1 - evidence[np.arange(len(given)), given]
    stated = confidence.curve(score, found)(score)
    place = np.digitize(stated, [0.2, 0.4, 0.6, 0.8])
    for b in np.unique(place):
        if (place == b).sum() > 100:
            assert stated[place == b].mean() == pytest.approx(wrong[place == b].mean(), abs=0.1)
    suspects = evidence.argmax(axis=1) != given
    assert stated[suspects].mean() == pytest.approx(wrong[suspects].mean(), abs=0.05)


def test_classes_that_nobody_has_and_few_examples():
    evidence = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]])
    noise = confidence.noise(evidence, np.array([0, 1]))
    found = confidence.wrong(evidence, np.array([0, 1]), noise)
    assert np.isfinite(noise.rates).all()
    assert ((found >= 0) & (found <= 1)).all()
    one = confidence.noise(np.ones((3, 1)), np.zeros(3, int))
    assert confidence.wrong(np.ones((3, 1)), np.zeros(3, int), one).tolist() == [0, 0, 0]


def test_nearest_rising_curve():
    curve = confidence.curve(np.array([3.0, 1, 2, 4]), np.array([0.2, 0.1, 0.4, 0.9]))
    np.testing.assert_allclose(curve.score, [1, 2.5, 4])
    np.testing.assert_allclose(curve.probability, [0.1, 0.3, 0.9])
    np.testing.assert_allclose(curve(np.array([0, 1.75, 9])), [0.1, 0.2, 0.9])
