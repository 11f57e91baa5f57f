import numpy as np
import pytest

from tracin_beam.stages import joining
from tracin_beam.stages.joining import Census, Group, Join, TableFile
from tracin_beam.storage.runs import Output, Shard, ShardResult


def result(name, read, rejected=(), kind="test"):
    shard = Shard(f"/data/{name}", name, "x")
    return ShardResult(kind, shard, read, tuple((position, "bad") for position in rejected))


def census_of(tests, groups=(), train_rows=0):
    return Census(tuple(groups), tuple(tests), train_rows, np.empty(0, np.int64))


def test_queries_are_numbered_by_shard_and_position():
    census = census_of([result("a", 3, [1]), result("b", 2, [0, 1]), result("c", 4)])
    assert census.starts.tolist() == [0, 2, 2, 6]
    assert census.queries == 6
    shard, position = census.places(np.array([5, 0, 1, 2]))
    assert shard.tolist() == [2, 0, 0, 2]
    assert position.tolist() == [3, 0, 2, 0]


def test_a_large_test_shard_has_several_files(monkeypatch):
    monkeypatch.setattr(joining, "_FILE_ROWS", 40)
    census = census_of([result("a", 5), result("b", 1, [0]), result("c", 2)])
    files = census.files(10)
    assert files == [
        TableFile(0, 0, 2),
        TableFile(0, 2, 4),
        TableFile(0, 4, 5),
        TableFile(1, 5, 5),
        TableFile(2, 5, 7),
    ]


def test_all_pairs_where_there_are_few():
    tests = [result("a", 200)]
    assert census_of(tests, train_rows=10_000).all_pairs
    assert not census_of(tests, train_rows=10_001).all_pairs


def test_groups_of_training_shards():
    train = [result(name, 5, kind="train") for name in "abcd"]
    groups = [Group(4, (train[0], train[2]), ""), Group(7, (train[3],), "")]
    census = census_of([], groups)
    assert census.group_of([r.shard for r in train]).tolist() == [0, -1, 0, 1]


def sample(tests, count):
    return joining.sample_queries(tests, census_of(tests).starts, count).tolist()


def test_the_sample_of_queries_is_stable_and_usable():
    tests = [result("b", 100), result("c", 100)]
    chosen = sample(tests, 10)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 10
    # Fewer queries: of those before, none is new.
    assert set(sample(tests, 5)) < set(chosen)
    shard, position = census_of(tests).places(np.array(chosen))
    places = set(zip(shard.tolist(), position.tolist(), strict=True))
    fewer = [result("b", 100, [p for s, p in places if s == 0][:1]), tests[1]]
    shard, position = census_of(fewer).places(np.array(sample(fewer, 10)))
    assert len(set(zip(shard.tolist(), position.tolist(), strict=True)) & places) >= 8
    assert sample([result("b", 3), result("c", 3)], 10) == list(range(6))
    assert sample(tests, 0) == []


def test_blocks_of_queries():
    found = [
        (block, part.start, part.stop)
        for block, part in joining.by_block(np.array([0, 1, 9, 9, 10, 31]), 10)
    ]
    assert found == [(0, 0, 4), (1, 4, 5), (3, 5, 6)]


@pytest.mark.parametrize("size", [1, 3, 100])
def test_queries_are_read_across_shards(tmp_path, size, write_rows):
    tests = [result("a", 4, [2]), result("b", 0), result("c", 5)]
    join = Join(
        Output(str(tmp_path)),
        (),
        tuple(r.shard for r in tests),
        "test",
        "loss",
        write_rows.checkpoints,
        None,
        {},
        "TracInCP",
        16,
        8,
    )
    written = write_rows("test", tests)
    census = census_of(tests)
    numbers, parts = [], []
    for queries, vectors in joining.read_queries(join, census, size):
        assert len(queries) <= size
        numbers += queries.tolist()
        parts.append(vectors.copy())
    assert numbers == list(range(8))
    expected = np.hstack(
        [
            np.concatenate([np.delete(written["a", c.step], 2, axis=0), written["c", c.step]])
            for c in write_rows.checkpoints
        ]
    )
    np.testing.assert_array_equal(np.concatenate(parts), expected)
    some = np.array([0, 2, 7])
    np.testing.assert_array_equal(joining.queries_at(join, census, some), expected[some])


def test_training_examples_are_read_in_blocks_across_shards(tmp_path, monkeypatch, write_rows):
    monkeypatch.setattr(joining, "block_rows", lambda numbers: 4)
    train = [result("a", 4, [2], "train"), result("b", 0, (), "train"), result("c", 6, (), "train")]
    join = Join(
        Output(str(tmp_path)),
        tuple(r.shard for r in train),
        (),
        "test",
        "loss",
        write_rows.checkpoints,
        None,
        {},
        "TracInCP",
        16,
        8,
    )
    written = write_rows("train", train)
    matrices = [
        np.concatenate([np.delete(written["a", c.step], 2, axis=0), written["c", c.step]])
        for c in write_rows.checkpoints
    ]
    places = [(0, 0), (0, 1), (0, 3), *((2, i) for i in range(6))]

    def check(found, matrix, start, stop):
        blocks = [(shard, position, rows.copy()) for shard, position, rows in found]
        assert [len(rows) for *_, rows in blocks[:-1]] == [4] * (len(blocks) - 1)
        shard, position, rows = (np.concatenate(column) for column in zip(*blocks, strict=True))
        assert list(zip(shard.tolist(), position.tolist(), strict=True)) == places[start:stop]
        np.testing.assert_allclose(rows, matrix[start:stop], rtol=1e-6)

    group = Group(0, tuple(train), "")
    check(joining.train_rows(join, group), np.hstack(matrices), 0, 9)
    rooted = [np.sqrt(c.learning_rate) * m for c, m in zip(join.checkpoints, matrices, strict=True)]
    for start, stop in ((0, 9), (2, 8), (3, 4)):
        found = joining.scaled_rows(join, group, start, stop)
        check(found, np.hstack(rooted), start, stop)
