"""`--dim=auto`: what is chosen, that it is kept, and what the pilot sample is."""

import io

import numpy as np
import pytest
import tiny as t
from tiny import Tiny

from tracin_beam.planning import dims, pilot
from tracin_beam.storage.records import RecordWriter
from tracin_beam.storage.runs import Shard


@pytest.fixture
def tiny(tmp_path, launch):
    return Tiny(tmp_path, launch).write_all()


def test_the_choice_is_kept(tiny, monkeypatch):
    assert tiny.run("embed", dim="auto") == 0
    state = tiny.run_json()
    assert state["config"]["dim"] == 256
    chosen = state["dim_auto"]
    assert (chosen["dim"], chosen["training_rows"], chosen["checkpoints"]) == (256, 24, 2)
    (row,) = chosen["table"]  # the model has fewer weights than that
    written = sum(path.stat().st_size for path in tiny.out.glob("embeddings/**/*.tfrecord"))
    assert row["embedding_bytes"] == pytest.approx(written, rel=0.02)
    files = t.snapshot(tiny.out / "embeddings")
    # A new day, on which another would be chosen.
    monkeypatch.setattr(dims, "DIMS", (64, 128))
    tiny.write("train-9.tfrecord", t.rows("train9.", 8, 9))
    assert tiny.run("influence", dim="auto") == 0
    tiny.check(tables=("influence",))
    assert tiny.run_json()["config"]["dim"] == 256
    assert tiny.run_json()["dim_auto"] == chosen
    after = t.snapshot(tiny.out / "embeddings")
    assert {name: after[name] for name in files} == files
    assert tiny.run("influence", dim=64) == 2
    # When everything is made anew, so is the choice.
    assert tiny.run("embed", dim="auto", seed=1) == 2
    assert tiny.run("embed", dim="auto", seed=1, overwrite=True) == 0
    assert tiny.run_json()["config"]["dim"] == 64


def test_self_influence_takes_training_examples_as_queries(tiny):
    assert tiny.run("self_influence", dim="auto") == 0
    tiny.check(tables=("self_influence",))
    chosen = tiny.run_json()["dim_auto"]
    assert (chosen["rows"], chosen["queries"]) == (18, 6)


def test_full_gradients_have_no_dim_to_choose(tiny):
    assert tiny.run("embed", dim="auto", projection="none") == 0
    assert "dim_auto" not in tiny.run_json()


def test_examples_that_cannot_be_used_are_no_part_of_the_pilot(tiny):
    bad = [row.but(x=np.full(4, np.nan, np.float32)) for row in t.rows("bad", 2, 5)]
    tiny.write("train-8.tfrecord", t.framed([*t.rows("train8.", 20, 8), *bad, b"rubbish"]))
    assert tiny.run("embed", dim="auto") == 0
    assert tiny.run_json()["dim_auto"]["rows"] == 44


@pytest.mark.parametrize("rescore", [0, 20])
def test_a_larger_dim_is_taken_where_a_smaller_one_does_not_do(tiny, monkeypatch, rescore):
    monkeypatch.setattr(dims, "DIMS", (2, 4, 8, 16, 32))
    tiny.write("train-8.tfrecord", t.rows("train8.", 400, 8))
    flags = {"dim": "auto", "rescore": rescore, "top_k": 10, "recall": 0.8}
    assert tiny.run("embed", **flags) == 0
    table = tiny.run_json()["dim_auto"]["table"]
    recalls = [row["recall"] for row in table]
    assert [row["dim"] for row in table] == list(dims.DIMS[: len(table)])
    assert len(table) > 1
    assert max(recalls[:-1]) < 0.8
    assert tiny.run_json()["config"]["dim"] == table[int(np.argmax(recalls))]["dim"]


def shards_of(folder, sizes):
    found = []
    for i, size in enumerate(sizes):
        handle = io.BytesIO()
        writer = RecordWriter(handle)
        for j in range(size):
            writer.write(f"{i}:{j}".encode())
        (folder / f"{i}").write_bytes(handle.getvalue())
        found.append(Shard(str(folder / f"{i}"), f"{i}", ""))
    return found


def test_the_sample_is_spread(tmp_path):
    shards = shards_of(tmp_path, [100] * 40)
    some = pilot.sample(shards, 64)
    assert [record.position for record in some] == list(range(64))
    places = [tuple(map(int, record.data.split(b":"))) for record in some]
    assert len(set(places)) == 64
    assert len({shard for shard, _ in places}) == 16
    assert places != sorted(places)
    assert {position for _, position in places} == {24, 49, 74, 99}
    assert some == pilot.sample(shards, 64)


def test_large_shards_make_up_for_small_ones(tmp_path):
    shards = shards_of(tmp_path, [1, 0, 2, 50])
    assert len(pilot.sample(shards, 20)) == 20
    assert len(pilot.sample(shards, 1000)) == 53
