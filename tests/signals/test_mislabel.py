"""Scores of labels by hand."""

import numpy as np
import pytest

from tracin_beam.signals import mislabel

M = np.array([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]])
LABEL = np.array([1, 2])


def test_score_suggestion_and_ratio():
    np.testing.assert_allclose(mislabel.scores(M, LABEL), [0.8, 0.6])
    assert mislabel.suggestions(M).tolist() == [0, 2]
    np.testing.assert_allclose(mislabel.best_other_ratio(M, LABEL), [3.5, 0.75])


def test_mixture_over_checkpoints():
    q = np.array([[[0.9, 0.1], [0.5, 0.5]]])
    p = np.array([[[0.2, 0.8], [0.4, 0.6]]])
    np.testing.assert_allclose(mislabel.mixed(q, p), [[(2 * 0.7 + 0.3) / 3, (2 * 0.3 + 0.7) / 3]])
    assert [mislabel.first_half(c) for c in (1, 2, 3, 10)] == [1, 1, 1, 5]


def test_each_label_by_itself():
    found = mislabel.separate_scores(np.array([[0.9, 0.2]]), np.array([[0, 1]]))
    np.testing.assert_allclose(found, [[0.9, 0.8]])


def test_surprise_of_a_regression():
    found = mislabel.surprise(np.array([3.0, -3.0]), np.array([[1.0, 1.0], [6.0, 0.0]]))
    np.testing.assert_allclose(found, [3, 3 / np.sqrt(18)])
    assert mislabel.as_score(found)[0] == pytest.approx(0.75)
    exact = mislabel.surprise(np.array([1.0, 0.0]), np.zeros((2, 2)))
    assert np.isfinite(exact).all()
