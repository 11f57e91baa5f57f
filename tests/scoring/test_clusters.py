"""k-means on arrays, against scikit-learn's from the same centres and a loop over batches."""

import numpy as np
import pytest
from sklearn.cluster import KMeans

from tracin_beam.scoring import clusters


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    middles = 3 * rng.normal(size=(4, 6))
    return (middles[rng.integers(0, 4, 300)] + rng.normal(size=(300, 6))).astype(np.float32)


def test_rounds_are_those_of_lloyd(rows):
    start = clusters.seeds(rows, 5, np.random.default_rng(1))
    centres, seen = start, np.zeros(5, np.int64)
    for _ in range(4):
        # Sums of parts add up, in whatever order.
        total = {}
        for part in np.array_split(rows, 3):
            for k, own in clusters.sums(part, clusters.assign(part, centres)[0]).items():
                total[k] = own.plus(total[k]) if k in total else own
        centres, seen = clusters.moved(centres, seen, total, whole=True)
    want = KMeans(5, init=start, n_init=1, max_iter=4, tol=0, algorithm="lloyd")
    want.fit(rows.astype(np.float64))
    np.testing.assert_allclose(centres, want.cluster_centers_, rtol=1e-5, atol=1e-6)
    cluster, distance = clusters.assign(rows, centres)
    far = np.linalg.norm(rows[:, None].astype(np.float64) - centres, axis=2)
    np.testing.assert_array_equal(cluster, np.argmin(far, axis=1))
    np.testing.assert_allclose(distance, far.min(axis=1), rtol=1e-9)


def test_a_part_of_the_rows_moves_centres_by_its_share(rows):
    centres, seen = rows[:3].astype(np.float64), np.zeros(3, np.int64)
    given = [[] for _ in range(3)]
    for turn in range(4):
        part = rows[turn % 2 :: 2][:40]
        cluster = np.argmin(np.linalg.norm(part[:, None] - centres, axis=2), axis=1)
        for row, k in zip(part, cluster, strict=True):
            given[k].append(row.astype(np.float64))
        found = clusters.sums(part, clusters.assign(part, centres)[0])
        centres, seen = clusters.moved(centres, seen, found, whole=False)
        for k, all_of_it in enumerate(given):
            np.testing.assert_allclose(centres[k], np.mean(all_of_it, axis=0))
            assert seen[k] == len(all_of_it)


def test_a_centre_that_is_given_nothing_stays():
    centres = np.array([[0.0], [100.0]])
    found = clusters.sums(np.ones((2, 1), np.float32), np.zeros(2, np.int32))
    moved, seen = clusters.moved(centres, np.zeros(2, np.int64), found, whole=True)
    assert moved.tolist() == [[1.0], [100.0]]
    assert seen.tolist() == [2, 0]


def test_first_centres_are_far_from_each_other():
    # Three places, of which one has nearly all rows: each gets a centre.
    rows = np.repeat(np.float32([[0, 0], [50, 0], [0, 50]]), [500, 1, 1], axis=0)
    found = clusters.seeds(rows, 3, np.random.default_rng(0))
    assert sorted(found.tolist()) == [[0, 0], [0, 50], [50, 0]]
    again = clusters.seeds(rows, 3, np.random.default_rng(0))
    np.testing.assert_array_equal(found, again)
    # More centres than places: rows, none of them twice.
    assert clusters.seeds(rows, 5, np.random.default_rng(0)).shape == (5, 2)


def test_distances_of_rows_far_from_zero_are_exact():
    # Of squares in float32 nothing would be left.
    rows = np.float32([[10_000, 1], [10_000, 1.25]])
    cluster, distance = clusters.assign(rows, np.array([[10_000.0, 1.0], [-1.0, 0.0]]))
    assert (cluster.tolist(), distance.tolist()) == ([0, 0], [0, 0.25])


def test_unit_length():
    found = clusters.of_unit_length(np.float32([[3, 4], [0, 0], [1e-20, 0]]))
    np.testing.assert_allclose(found, [[0.6, 0.8], [0, 0], [1, 0]], rtol=1e-6)
