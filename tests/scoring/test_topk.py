import numpy as np
import pytest

from tracin_beam.scoring import topk
from tracin_beam.scoring.topk import OPPONENT, PROPONENT, ROLES, Candidates, Ends


def rows_of(rows):
    columns = (rows.query, rows.shard, rows.position, rows.score)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def candidates(*rows):
    query, shard, position, score = zip(*rows, strict=True)
    return Candidates(
        np.array(query), np.array(shard, np.int32), np.array(position), np.array(score, float)
    )


def brute(rows, count, role):
    sign = -1 if role == PROPONENT else 1
    found = []
    for query in sorted({row[0] for row in rows}):
        mine = [row for row in rows if row[0] == query]
        found += sorted(mine, key=lambda row: (sign * row[3], row[1], row[2]))[:count]
    return found


ROWS = [(q, s, p, float(v)) for q, s, p, v in np.random.default_rng(0).integers(0, 5, (200, 4))]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("count", [1, 3, 1000])
def test_best_of_each_query_with_ties_in_the_order_of_places(role, count):
    rows = candidates(*ROWS)
    assert rows_of(topk.best(rows, rows.score, count, role)) == brute(ROWS, count, role)


def test_ranks_count_within_runs():
    assert topk.ranks_within(np.array([3, 3, 5, 7, 7, 7])).tolist() == [0, 1, 0, 0, 1, 2]
    assert topk.ranks_within(np.array([], np.int64)).tolist() == []


@pytest.mark.parametrize("role", ROLES)
def test_ends_are_the_best_and_what_equals_the_last_of_them(role):
    scores = np.random.default_rng(1).integers(0, 6, (4, 30)).astype(float)
    query, column = topk.ends(scores, 5, role)
    sign = 1 if role == PROPONENT else -1
    for q in range(4):
        worst = np.sort(sign * scores[q])[-5]
        assert column[query == q].tolist() == np.flatnonzero(sign * scores[q] >= worst).tolist()
    assert len(topk.ends(scores, 31, role)[0]) == scores.size


@pytest.mark.parametrize("levels", [3, 10**6])  # with many ties, with none
@pytest.mark.parametrize("sizes", [[7], [1, 1, 50, 3, 40], [40] * 10, [200, 3, 3]])
@pytest.mark.parametrize("count", [1, 10, 500])
def test_both_ends_over_blocks_are_those_of_all(levels, sizes, count):
    rng = np.random.default_rng(2)
    queries = np.array([3, 4, 9])
    ends, every = Ends(queries, count), []
    for shard, size in enumerate(sizes):
        scores = rng.integers(0, levels, (3, size)).astype(np.float32)
        position = np.arange(size)
        ends.add(scores, np.full(size, shard, np.int32), position)
        every += [
            (int(q), shard, int(p), float(scores[i, p]))
            for i, q in enumerate(queries)
            for p in position
        ]
    for role in ROLES:
        assert rows_of(ends.of(role)) == brute(every, count, role)


def test_ends_hold_little():
    ends = Ends(np.arange(2), 5)
    rng = np.random.default_rng(3)
    for shard in range(200):
        ends.add(rng.normal(size=(2, 50)), np.full(50, shard, np.int32), np.arange(50))
        for role in ROLES:
            assert sum(len(part.score) for part in ends._parts[role]) <= 2 * 5 * 5 + 2 * 50
    assert [len(ends.of(role).score) for role in ROLES] == [10, 10]


def test_ends_of_nothing():
    assert len(Ends(np.arange(2), 5).of(OPPONENT).score) == 0
