"""Scores of labels by hand."""

import numpy as np
import pytest

from tracin_beam.signals import mislabel, ridge

M = np.array([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]])
LABEL = np.array([1, 2])


def test_score_suggestion_and_ratio():
    expected = [1 / (1 + 0.2 / np.sqrt(0.7)), 1 / (1 + 0.4 / np.sqrt(0.3))]
    np.testing.assert_allclose(mislabel.scores(M, LABEL), expected)
    assert mislabel.suggestions(M).tolist() == [0, 2]
    np.testing.assert_allclose(mislabel.best_other_ratio(M, LABEL), [3.5, 0.75])


def test_mixture_over_checkpoints():
    q = np.array([[[0.9, 0.1], [0.5, 0.5]]])
    p = np.array([[[0.2, 0.8], [0.4, 0.6]]])
    np.testing.assert_allclose(mislabel.mixed(q, p), [[(2 * 0.7 + 0.3) / 3, (2 * 0.3 + 0.7) / 3]])
    assert [mislabel.first_half(c) for c in (1, 2, 3, 10)] == [1, 1, 1, 5]


def test_product_of_three_and_votes():
    votes = mislabel.votes(np.array([[0, 0, 1, np.nan]]), np.array([0.5, 0.5]))
    np.testing.assert_allclose(votes, [[2.5 / 4, 1.5 / 4]])
    q, p = np.array([[[0.9, 0.1], [0.5, 0.5]]]), np.array([[1.0, 0.0]])
    m = mislabel.joined(q, p, votes)
    parts = 0.7**3 * 1**2 * 0.625, 0.3**3 * 0.05**2 * 0.375
    np.testing.assert_allclose(m[0, 0] / m[0, 1], (parts[0] / parts[1]) ** (1 / 6))
    np.testing.assert_allclose(m.sum(axis=1), 1)
    # Without neighbours the classes' shares are as good as any.
    np.testing.assert_allclose(mislabel.votes(np.zeros((1, 0)), np.array([0.2, 0.8])), [[0.2, 0.8]])


def test_each_label_by_itself():
    found = mislabel.separate_scores(np.array([[0.9, 0.2]]), np.array([[0, 1]]))
    np.testing.assert_allclose(found, [[0.9, 0.8]])


def test_surprise_of_a_regression():
    # Of a normal distribution whose standard deviation is 1 the mean |x| is √(2/π).
    usual = np.sqrt(2 / np.pi)
    found = mislabel.surprise(np.array([3.0, -3.0, 3.0]), np.array([1, 2, -1]) * usual, usual)
    np.testing.assert_allclose(found, [3, 1.5, 15])
    assert mislabel.as_score(found)[0] == pytest.approx(0.75)
    assert np.isfinite(mislabel.surprise(np.array([1.0, 0.0]), np.zeros(2), 0.0)).all()


def test_confident_class_by_hand():
    usual = np.array([0.6, 0.3, np.nan])
    q = np.array([[0.65, 0.35, 0.0], [0.5, 0.4, 0.1], [0.55, 0.25, 0.2], [0.1, 0.1, 0.8]])
    assert mislabel.confident(q, usual).tolist() == [0, 1, -1, -1]


def test_wrong_labels_by_hand():
    # Of class 0 one of three that are confidently taken for something is taken for another, of four
    # given; of class 1 one of two, of two given.
    label = np.array([0, 0, 0, 0, 1, 1])
    taken_for = np.array([0, 0, 1, -1, 1, 0])
    sure = np.array([0.9, 0.8, 0.7, 0.3, 0.6, 0.5])
    _, high = mislabel.wrong_labels(label, taken_for, taken_for, sure)
    expected = 4 / 3 + 2 / 2
    assert high == round(expected + 1.645 * np.sqrt(expected))
    agreeing = np.zeros(100, int)
    assert mislabel.wrong_labels(agreeing, agreeing, agreeing, np.ones(100)) == (0, 0)
    # All disagree: the lower limit of a rate that is 1 among 40, and not more than there are.
    low, high = mislabel.wrong_labels(agreeing, agreeing + 1, agreeing + 1, np.ones(100))
    assert (low, high) == (int(100 * 40 / (40 + 1.645**2)), 100)


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("flips", ["uniform", "neighbour", "near the border"])
@pytest.mark.parametrize("spread", [0.3, 0.7])
def test_range_holds_flips_of_known_rate(rate, flips, spread):
    rng = np.random.default_rng(7)
    n, classes = 4000, 4
    true = rng.integers(0, classes, n)
    x = np.eye(classes)[true] + spread * rng.normal(size=(n, classes))
    order = rng.permutation(n)
    if flips == "near the border":
        margin = x[np.arange(n), true] - np.where(np.eye(classes)[true] > 0, -9, x).max(axis=1)
        order = np.argsort(margin + 0.5 * rng.normal(size=n))
    wrong = order[: round(rate * n)]
    label = true.copy()
    step = 1 if flips == "neighbour" else rng.integers(1, classes, len(wrong))
    label[wrong] = (true[wrong] + step) % classes
    y = np.eye(classes)[label]
    fitted = ridge.fit(ridge.sums(x, y))
    output = ridge.leave_one_out(fitted, int(ridge.errors(fitted, x, y).argmin()), x, y)
    likely, own = ridge.tempered(output, y)
    q = ridge.probabilities(output, ridge.TEMPERATURES[int(likely.argmax())])
    taken_for = mislabel.confident(q, own[likely.argmax()] / y.sum(axis=0))
    low, high = mislabel.wrong_labels(label, taken_for, q.argmax(axis=1), q.max(axis=1))
    # Wrong labels where classes cannot be told look like right ones, and none counts them.
    assert low <= len(wrong)
    assert len(wrong) <= high or flips == "near the border"
