"""Long lists travel to workers by path."""

import pickle

import pytest
import remote_files

from tracin_beam.storage import listings, runs
from tracin_beam.storage.runs import CheckpointFile, Output, Shard, Unit

CHECKPOINT = CheckpointFile("c/1.weights.h5", 1, None, 0.1, "8:abc", "some")


def shards_of(count):
    names = [f"train-{i:05d}" for i in range(count)]
    return [Shard(f"data/{name}", name, f"{i}:c0ffee", "s") for i, name in enumerate(names)]


@pytest.fixture(params=["", remote_files.PREFIX], ids=["local", "remote"])
def output(request, tmp_path):
    return Output(f"{request.param}{tmp_path}/out")


@pytest.mark.parametrize("count", [0, 3, 500])
def test_what_arrives_is_what_was_sent(output, count):
    shards = shards_of(count)
    units = [Unit("train", shard, CHECKPOINT, "loss", f"f{i}") for i, shard in enumerate(shards)]
    by_path = {shard.path: shard.name for shard in shards}
    sent = [
        listings.of_list(output, shards),
        listings.of_list(output, units),
        listings.of_dict(output, by_path),
    ]
    arrived = pickle.loads(pickle.dumps(sent))
    assert arrived == [tuple(shards), tuple(units), by_path]
    again = pickle.loads(pickle.dumps(arrived))
    assert again == arrived
    assert runs.digest(again[2]) == runs.digest(by_path)


def test_what_travels_is_short(output):
    shards = listings.of_list(output, shards_of(5000))
    assert len(pickle.dumps([shards, shards])) < 1000
    others = listings.of_list(output, shards_of(4999))
    assert others.path != shards.path


def test_those_of_dead_runs_are_swept(output):
    path = listings.of_list(output, shards_of(500)).path
    there = runs.files.under(output.root)
    assert path in there
    runs.sweep(output, there, [])
    assert not runs.files.exists(path)
