"""Nearest neighbours in features: against a loop over all pairs."""

import numpy as np

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


def search(queries, pieces, k, **kwargs):
    nearest = neighbours.Nearest(queries, k)
    first = 0
    for number, piece in enumerate(pieces):
        own = np.arange(len(queries)) - first if kwargs.get("own") else None
        nearest.add(piece, number, np.arange(len(piece)), own)
        first += len(piece)
    return nearest.found


def test_nearest_are_those_of_all_pairs(monkeypatch):
    monkeypatch.setattr(neighbours, "_BLOCK", 7)
    pieces = [PHI[:11], PHI[11:12], PHI[12:]]
    starts = np.array([0, 11, 12])
    found = search(PHI, pieces, 3, own=True)
    for i, phi in enumerate(PHI):
        expected = by_hand(phi, PHI, 3, without=i)
        assert (starts[found.shard[i]] + found.row[i]).tolist() == [p for _, p in expected]
        np.testing.assert_allclose(found.distance[i], [far for far, _ in expected], rtol=1e-3)
    found = search(PHI[:2], [PHI], 1)
    assert found.row.tolist() == [[0], [1]]
    assert found.distance.tolist() == [[0.0], [0.0]]
    few = search(PHI[:2], [PHI[:2]], 5, own=True)
    assert few.row[:, 0].tolist() == [1, 0]
    assert (few.shard[:, 1:] == -1).all()
    assert np.isinf(few.distance[:, 1:]).all()


def test_only_some_queries_see_rows():
    nearest = neighbours.Nearest(PHI, 2)
    nearest.add(PHI, 0, np.arange(30), only=np.array([3, 7]))
    assert (nearest.found.row[[3, 7], 0] == [3, 7]).all()
    assert (nearest.found.shard[:3] == -1).all()


def test_labels_of_others():
    found = search(PHI, [PHI], 4, own=True)
    usual = found.distance.mean(axis=1)
    around = neighbours.Around(LABEL, LABEL[found.row], found.distance, usual[found.row])
    expected = [np.mean([LABEL[p] == LABEL[i] for p in found.row[i]]) for i in range(30)]
    np.testing.assert_allclose(neighbours.neighbour_agreement(around), expected)
    several = np.stack([LABEL, LABEL == 1], axis=1)
    both = [np.mean([several[p] == several[i] for p in found.row[i]]) for i in range(30)]
    around = neighbours.Around(several, several[found.row], found.distance, usual[found.row])
    np.testing.assert_allclose(neighbours.neighbour_agreement(around), both)
    np.testing.assert_allclose(neighbours.neighbour_distance(around), usual)


def test_an_example_far_from_others():
    phi = np.vstack([PHI, PHI[4], PHI[:1] + 100])
    found = search(phi, [phi], 5, own=True)
    scores = neighbours.outlyingness(found.distance, found.distance.mean(axis=1)[found.row])
    assert scores.argmax() == 31
    same = np.zeros((4, 2))
    np.testing.assert_array_equal(neighbours.outlyingness(same, same), np.ones(4))
