import itertools

import numpy as np
import pytest

from tracin_beam.errors import InputError
from tracin_beam.stages.influence import (
    OPPONENT,
    PROPONENT,
    Scored,
    TopScored,
    _chunks,
    by_train_shard,
    merge,
    ranked,
)
from tracin_beam.storage.records import RecordWriter


def scored(*rows):
    """From (shard, position, score); by checkpoint it is a third and two thirds of the score."""
    shard, position, score = (np.array(column) for column in zip(*rows, strict=True))
    thirds = np.stack([score / 3, 2 * score / 3], axis=1)
    return Scored(shard.astype(np.int32), position.astype(np.int64), score.astype(float), thirds)


def rows_of(value):
    rows = list(
        zip(value.shard.tolist(), value.position.tolist(), value.score.tolist(), strict=True)
    )
    np.testing.assert_allclose(value.by_checkpoint.sum(axis=1), value.score)
    return rows


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
    scored((1, 0, 5.0), (1, 1, -2.0), (1, 2, 0.5)),
    scored((0, 7, 5.0)),
    scored((0, 2, 1e-3), (0, 9, -8.0)),
    scored((2, 4, 9.0), (2, 5, -2.0)),
]


@pytest.mark.parametrize("count", [1, 3, 5, 100])
@pytest.mark.parametrize("role", [PROPONENT, OPPONENT])
def test_top_scored_is_the_same_in_whatever_order_it_is_combined(role, count):
    sign = -1 if role == PROPONENT else 1
    every = sorted(
        (row for value in INPUTS for row in rows_of(value)),
        key=lambda row: (sign * row[2], row[0], row[1]),
    )
    ways = 0
    for got in every_way(TopScored(count, role), INPUTS):
        assert rows_of(got) == every[:count]
        ways += 1
    assert ways == 24 * 8 * 2


def test_accumulators_stay_small():
    combiner = TopScored(2, OPPONENT)
    accumulator = combiner.create_accumulator()
    for i in range(50):
        accumulator = combiner.add_input(accumulator, scored((0, i, float(i)), (1, i, -float(i))))
        assert sum(len(part.score) for part in accumulator) <= 2
    assert rows_of(combiner.extract_output(accumulator)) == [(1, 49, -49.0), (1, 48, -48.0)]


def test_scores_without_parts_by_checkpoint():
    empty = Scored(np.zeros(2, np.int32), np.arange(2), np.array([1.0, 2.0]), np.empty((2, 0)))
    got = merge([empty, empty]).top(1, PROPONENT)
    assert got.by_checkpoint.shape == (1, 0)
    assert got.score.tolist() == [2.0]


def test_places_by_training_shard():
    key = ((0, 3), PROPONENT)
    value = scored((4, 9, 1.0), (2, 6, 3.0), (4, 1, 2.0))
    places = {
        shard: (k, positions.tolist()) for shard, (k, positions) in by_train_shard((key, value))
    }
    assert places == {2: (key, [6]), 4: (key, [1, 9])}


def test_ranks_count_from_one():
    key = ((0, 3), OPPONENT)
    value = scored((4, 9, -3.0), (2, 6, 1.5))
    assert list(ranked((key, value))) == [
        (4, (key, 1, -3.0, [-1.0, -2.0], 9)),
        (2, (key, 2, 1.5, [0.5, 1.0], 6)),
    ]


def test_records_that_are_not_there_any_more_are_missed(tmp_path):
    path = tmp_path / "cut.tfrecord"
    with path.open("wb") as handle:
        RecordWriter(handle).write_all([b"a", b"b", b"c"])
    ((positions, data),) = _chunks(str(path), np.array([0, 2]))
    assert (positions.tolist(), data) == ([0, 2], [b"a", b"c"])
    with pytest.raises(InputError, match=r"cut\.tfrecord changed .* 2 of 4"):
        list(_chunks(str(path), np.array([0, 2, 3, 4])))
