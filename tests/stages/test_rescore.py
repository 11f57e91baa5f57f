import numpy as np
import pytest

from tracin_beam.errors import InputError
from tracin_beam.scoring.topk import ROLES, Scored
from tracin_beam.stages import rescore
from tracin_beam.stages.joining import Census, Group, Join
from tracin_beam.stages.rescore import Products
from tracin_beam.storage.records import RecordWriter
from tracin_beam.storage.runs import Output, Shard, ShardResult


def join_of(*paths):
    shards = tuple(Shard(str(path), path.name, "x") for path in paths)
    return Join(Output("out"), shards, (), "test", "loss", (), None, {}, "", 1, 1)


@pytest.fixture
def shards(tmp_path):
    paths = []
    for name, content in (("a", "012"), ("b", "34567")):
        path = tmp_path / f"{name}.tfrecord"
        with path.open("wb") as handle:
            RecordWriter(handle).write_all([c.encode() for c in content])
        paths.append(path)
    return join_of(*paths)


def chunks(join, places):
    return [
        (shard.tolist(), position.tolist(), b"".join(data))
        for shard, position, data in rescore._chunks(join, np.array(places))
    ]


def test_records_of_several_shards_come_together(shards, monkeypatch):
    places = [(0, 0), (0, 2), (1, 1), (1, 4)]
    assert chunks(shards, places) == [([0, 0, 1, 1], [0, 2, 1, 4], b"0247")]
    monkeypatch.setattr(rescore, "CHUNK_BYTES", 3)
    assert chunks(shards, places) == [([0, 0, 1], [0, 2, 1], b"024"), ([1], [4], b"7")]


def test_records_that_are_not_there_any_more_are_missed(shards):
    with pytest.raises(InputError, match=r"a\.tfrecord changed .* 2 of 4"):
        chunks(shards, [(0, 0), (0, 2), (0, 3), (0, 4)])


def test_places_of_a_block_go_to_their_groups(shards):
    results = [ShardResult("train", shard, 5, ()) for shard in shards.train]
    census = Census(
        (Group(0, (results[1],), ""), Group(1, (results[0],), "")), (), 10, np.empty(0, int)
    )
    rows = Scored(
        np.array([0, 0, 1]), np.array([1, 0, 1]), np.array([4, 2, 4]), np.ones(3), np.ones((3, 1))
    )
    found = dict(rescore.places_by_group((3, (rows, rows)), census, shards))
    assert {g: (block, places.tolist()) for g, (block, places) in found.items()} == {
        0: (3, [[1, 4]]),
        1: (3, [[0, 2]]),
    }
    assert rescore.places_of(shards, Group(0, tuple(results), "")).tolist() == [
        [s, p] for s in (0, 1) for p in range(5)
    ]


def test_both_ends_of_products():
    terms = np.random.default_rng(0).normal(size=(2, 20, 3))
    products = Products(np.array([7, 9]), np.zeros(20, np.int32), np.arange(20), terms)
    for role, rows in zip(ROLES, rescore.best_of(products, 4), strict=True):
        for q, query in enumerate((7, 9)):
            mine = rows.query == query
            order = np.argsort(terms[q].sum(axis=1))
            order = order[::-1][:4] if role == "proponent" else order[:4]
            assert rows.position[mine].tolist() == order.tolist()
            np.testing.assert_array_equal(rows.by_checkpoint[mine], terms[q, order])
    half = [
        products._replace(
            shard=products.shard[part],
            position=products.position[part],
            by_checkpoint=terms[:, part],
        )
        for part in (slice(0, 11), slice(11, 20))
    ]
    together = rescore.merged(*(rescore.best_of(part, 4) for part in half), 4)
    for one, other in zip(together, rescore.best_of(products, 4), strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
