import itertools

import numpy as np
import pytest

from tracin_beam.scoring.topk import ROLES, SIGNS, Candidates, Scored, best
from tracin_beam.stages import index, joining, search
from tracin_beam.stages.joining import Group, Join
from tracin_beam.stages.search import TopOfBlock
from tracin_beam.storage import runs
from tracin_beam.storage.runs import Output, Shard, ShardResult


def scored(*rows):
    """From (query, shard, position, score); a third and two thirds of the score by checkpoint."""
    query, shard, position, score = (np.array(column) for column in zip(*rows, strict=True))
    thirds = np.stack([score / 3, 2 * score / 3], axis=1)
    return Scored(query, shard.astype(np.int32), position, score.astype(float), thirds)


def rows_of(rows):
    return list(zip(*(column.tolist() for column in rows), strict=True))


def every_way(combiner, inputs):
    """What a combiner gives for the inputs in every order and split, compacted or not."""
    for order in itertools.permutations(inputs):
        for cuts in itertools.product([False, True], repeat=len(order) - 1):
            groups = [[order[0]]]
            for value, cut in zip(order[1:], cuts, strict=True):
                groups.append([value]) if cut else groups[-1].append(value)
            for compact in (False, True):
                accumulators = [combiner.create_accumulator()]
                for group in groups:
                    accumulator = combiner.create_accumulator()
                    for value in group:
                        accumulator = combiner.add_input(accumulator, value)
                        if compact:
                            accumulator = combiner.compact(accumulator)
                    accumulators.append(accumulator)
                merged = combiner.merge_accumulators(accumulators)
                yield combiner.extract_output(combiner.compact(merged) if compact else merged)


INPUTS = [
    scored((3, 1, 0, 5.0), (3, 1, 1, -2.0), (4, 1, 2, 0.5)),
    scored((3, 0, 7, 5.0)),
    scored((3, 0, 2, 1e-3), (4, 0, 9, -8.0)),
    scored((3, 2, 4, 9.0), (3, 2, 5, -2.0)),
]


@pytest.mark.parametrize("count", [1, 3, 100])
def test_the_best_are_the_same_in_whatever_order_they_are_combined(count):
    every = Scored(*(np.concatenate(columns) for columns in zip(*INPUTS, strict=True)))
    expected = [rows_of(best(every, every.score, count, role)) for role in ROLES]
    for both in every_way(TopOfBlock(count), [(rows, rows) for rows in INPUTS]):
        assert [rows_of(rows) for rows in both] == expected


def result(kind, name, read, rejected=()):
    shard = Shard(f"/{kind}/{name}", name, "x")
    return ShardResult(kind, shard, read, tuple((position, "bad") for position in rejected))


@pytest.fixture
def problem(tmp_path, write_rows):
    """A join of random embeddings, its census, and all estimated scores by place."""
    train = [result("train", "a", 30, [3]), result("train", "b", 20), result("train", "c", 0)]
    tests = [result("test", "d", 5, [1]), result("test", "e", 3)]
    join = Join(
        Output(str(tmp_path)),
        tuple(r.shard for r in train),
        tuple(r.shard for r in tests),
        "test",
        "loss",
        write_rows.checkpoints,
        None,
        {r.shard.path: r.shard.name for r in [*train, *tests]},
        "TracInCP",
        16,
        3,
    )
    mine, other = write_rows(runs.TRAIN, train), write_rows("test", tests)
    groups = index.planned_groups(join, train, 100)
    census = joining.take_census(join, groups, train, tests, 2)
    places = [(s, p) for s, r in enumerate(train) for p in joining.usable(r)]
    queries = [(r.shard.name, p) for r in tests for p in joining.usable(r)]
    scores = np.zeros((len(queries), len(places)))
    for (q, (name, p)), (i, (s, at)) in itertools.product(enumerate(queries), enumerate(places)):
        for c in write_rows.checkpoints:
            own = mine[train[s].shard.name, c.step][at].astype(np.float64)
            scores[q, i] += c.learning_rate * own @ other[name, c.step][p].astype(np.float64)
    return join, census, np.array(places), scores


def check(found, places, scores, count):
    """Candidates of both roles are each query's best, by brute force."""
    for role, rows in zip(ROLES, found, strict=True):
        assert np.unique(rows.query).tolist() == list(range(len(scores)))
        for query, own in enumerate(scores):
            mine = rows.query == query
            order = np.argsort(-SIGNS[role] * own, kind="stable")[:count]
            at = np.stack([rows.shard[mine], rows.position[mine]], axis=1)
            assert at.tolist() == places[order].tolist()
            np.testing.assert_allclose(rows.score[mine], own[order], rtol=1e-4, atol=1e-5)


def combined(parts, count):
    """Both roles' best of (block, both) pairs."""
    accumulator = TopOfBlock(count).merge_accumulators([[both] for _, both in parts])
    return TopOfBlock(count).extract_output(accumulator)


@pytest.mark.parametrize("count", [1, 7, 100])
@pytest.mark.parametrize("queries", [2, 4096])
def test_the_product_finds_the_best(problem, count, queries, monkeypatch):
    monkeypatch.setattr(search, "queries_at_a_time", lambda numbers: queries)
    join, census, places, scores = problem
    (group,) = census.groups
    parts = list(search.by_product(join, census, group, count))
    assert {block for block, _ in parts} == {0, 1, 2}  # seven queries
    for block, both in parts:
        assert all(set(rows.query // join.block) == {block} for rows in both)
    check(combined(parts, count), places, scores, count)


@pytest.mark.parametrize("index_rows", [100, 20, 7])
def test_the_index_finds_the_best_of_every_piece(problem, index_rows):
    join, census, places, scores = problem
    (group,) = census.groups
    parts = []
    for piece in index.pieces(group, index_rows):
        index.build(join, piece)
        parts += search.by_index(join, census, piece, 20)
    # Its rows are int8; whole embeddings tell the order.
    blocks = sorted({block for block, _ in parts})
    asked = [(b, combined([part for part in parts if part[0] == b], 20)) for b in blocks]
    both = combined(list(search.estimate(join, census, asked)), 10)
    check([Candidates(*rows[:4]) for rows in both], places, scores, 10)


def test_pairs_are_estimated_again_by_whole_embeddings(problem):
    join, census, places, scores = problem
    (group,) = census.groups
    parts = list(search.by_product(join, census, group, 9))
    blurred = [
        (block, tuple(rows._replace(score=np.zeros(len(rows.score))) for rows in both))
        for block, both in parts
    ]
    asked = [(block, both) for _, (block, both) in _flat(blurred, census, join)]
    found = list(search.estimate(join, census, asked))
    both = combined(found, 9)
    for rows in both:
        np.testing.assert_allclose(rows.by_checkpoint.sum(axis=1), rows.score)
    check([Candidates(*rows[:4]) for rows in both], places, scores, 9)


def _flat(parts, census, join):
    found = [item for pair in parts for item in search.by_group(pair, census, join)]
    assert {group for group, _ in found} == {0}
    return found


def test_rows_go_to_the_group_of_their_shard():
    train = [result("train", name, 5) for name in "abc"]
    groups = (Group(4, (train[0], train[2]), ""), Group(7, (train[1],), ""))
    census = joining.Census(groups, (), 15, np.empty(0, np.int64))
    join = Join(
        Output("out"), tuple(r.shard for r in train), (), "t", "loss", (), None, {}, "", 1, 1
    )
    rows = scored((0, 0, 9, 1.0), (0, 1, 6, 3.0), (0, 2, 1, 2.0))
    found = dict(search.by_group((5, (rows, rows)), census, join))
    assert [found[g][0] for g in (0, 1)] == [5, 5]
    assert [found[g][1][0].position.tolist() for g in (0, 1)] == [[9, 1], [6]]
