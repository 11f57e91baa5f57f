"""Nearest neighbours in features: against a loop over all pairs."""

import numpy as np
import pytest

from tracin_beam.signals import neighbours

RNG = np.random.default_rng(3)
PHI = (RNG.normal(size=(30, 4)) + 1e3).astype(np.float32)
LABEL = RNG.integers(3, size=30)


def by_hand(query, rows, k, without=None):
    far = [
        (float(np.linalg.norm(query.astype(np.float64) - row.astype(np.float64))), place)
        for place, row in enumerate(rows)
        if place != without
    ]
    return sorted(far)[:k]


def test_nearest_are_those_of_all_pairs(monkeypatch):
    monkeypatch.setattr(neighbours, "_BLOCK", 7)
    places, distances = neighbours.nearest(PHI, PHI, 3, np.arange(30))
    for i, phi in enumerate(PHI):
        expected = by_hand(phi, PHI, 3, without=i)
        assert places[i].tolist() == [place for _, place in expected]
        np.testing.assert_allclose(distances[i], [far for far, _ in expected], rtol=1e-9)
    places, distances = neighbours.nearest(PHI[:2], PHI, 1)
    assert places.tolist() == [[0], [1]]
    assert distances.tolist() == [[0.0], [0.0]]
    assert neighbours.nearest(PHI[:2], PHI[:2], 5, np.arange(2))[0].shape == (2, 1)
    with pytest.raises(ValueError, match="no neighbours"):
        neighbours.nearest(PHI[:1], PHI[:1], 5, np.arange(1))


def test_labels_of_others():
    places, _ = neighbours.nearest(PHI, PHI, 4, np.arange(30))
    found = neighbours.agreement(LABEL, LABEL[places])
    expected = [np.mean([LABEL[p] == LABEL[i] for p in places[i]]) for i in range(30)]
    np.testing.assert_allclose(found, expected)


def test_outliers_and_duplicates():
    phi = np.vstack([PHI, PHI[4], PHI[:1] + 100])
    places, distances = neighbours.nearest(phi, phi, 5, np.arange(32))
    scores = neighbours.outlyingness(distances, distances.mean(axis=1)[places])
    assert scores.argmax() == 31
    near = neighbours.near_duplicates(distances)
    assert np.flatnonzero(near[:, 0]).tolist() == [4, 30]
    assert near.sum() == 2
    assert places[[4, 30], 0].tolist() == [30, 4]
    same = np.zeros((4, 2))
    np.testing.assert_array_equal(neighbours.outlyingness(same, same), np.ones(4))
