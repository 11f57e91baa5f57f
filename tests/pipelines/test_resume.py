"""What is done is not done again, and a run that was killed ends as if it had not been."""

import copy
import json
import shutil
import signal
import time

import pyarrow.parquet as pq
import pytest
import tiny as t
from tiny import Tiny, rows

from tracin_beam.jobs import graphs, tryout

STAGES = ("influence", "self_influence")
# With several groups and parts of the index, and with a test set whose tables have several files.
FLAGS = {"index": "scann", "index_rows": 16}


def run_all(tiny, stages=STAGES, **changes):
    for stage in stages:
        assert tiny.run(stage, **{**FLAGS, **changes}) == 0


# Killed.

SLOW = t.TASK.replace(
    "    columns = {",
    """    import os, time
    def wait(x):
        time.sleep(float(os.environ.get("SLEEP", "0")))
        return x
    serialized = tf.py_function(wait, [serialized], tf.string)
    serialized = tf.ensure_shape(serialized, [None])
    columns = {""",
)


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory, launch):
    """A folder with the input, and what a run makes of it that is not disturbed."""
    tiny = Tiny(tmp_path_factory.mktemp("killed"), launch)
    tiny.write_all(train=5)
    tiny.write("train-1.tfrecord", [*rows("train1.", 8, 1)[:7], b"garbage"])
    (tiny.folder / "task.py").write_text(SLOW)
    run_all(tiny)
    tiny.expected = t.contents(tiny.out)
    return tiny


@pytest.fixture
def tiny(never_killed):
    shutil.rmtree(never_killed.out)
    return never_killed


def marks(tiny):
    return {
        path: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in (tiny.out / "embeddings").rglob("*.json")
    }


def test_killed_while_it_embeds(tiny, start):
    job = start("influence", tiny.argv("influence", **FLAGS), SLEEP="0.4")
    while len(marks(tiny)) < 5 and job.running():
        time.sleep(0.02)
    job.process.kill()
    assert job.wait() == -signal.SIGKILL, job.said()
    done = marks(tiny)
    assert 5 <= len(done) < 14
    files = {path.with_suffix(""): path.with_suffix("").stat().st_ino for path in done}
    # What is under a final name is whole, marked or not.
    for path in (tiny.out / "embeddings").rglob("[!.]*.tfrecord"):
        assert path.read_bytes() == tiny.expected[str(path.relative_to(tiny.out))]
    run_all(tiny)
    assert t.contents(tiny.out) == tiny.expected
    assert {path: marks(tiny)[path] for path in done} == done
    assert {path: path.stat().st_ino for path in files} == files


@pytest.mark.parametrize(
    ("stage", "module", "name", "calls"),
    [
        ("influence", "tracin_beam.stages.embed", "_write_rejected", 2),
        ("influence", "tracin_beam.stages.index", "build", 2),
        ("influence", "tracin_beam.storage.tables", "write", 2),  # of an index partition's rows
        ("influence", "tracin_beam.report.write", "write_influence_report", 1),
        ("self_influence", "tracin_beam.storage.sinks", "write_parquet", 3),
    ],
)
def test_killed_later(tiny, start, stage, module, name, calls):
    job = start(stage, tiny.argv(stage, **FLAGS), exits=(module, name, calls))
    assert job.wait() == 9, job.said()
    done = marks(tiny)
    run_all(tiny)
    assert t.contents(tiny.out) == tiny.expected
    assert {path: marks(tiny)[path] for path in done} == done


def test_unfinished_files_do_not_disturb(tiny):
    for folder in ("embeddings/train/10", "index/part-00000/scann", "influence/test"):
        (tiny.out / folder).mkdir(parents=True)
        (tiny.out / folder / ".train-0.tfrecord.0123.tmp").write_bytes(b"half")
        (tiny.out / folder / ".influence-00000-of-00002.parquet.0123.tmp").write_bytes(b"half")
    run_all(tiny)
    assert t.contents(tiny.out) == tiny.expected


# Something has changed.


@pytest.fixture(scope="module")
def kept(tmp_path_factory, launch):
    folder = tmp_path_factory.mktemp("changes")
    tiny = Tiny(folder, launch)
    tiny.write_all(train=5)
    run_all(tiny)
    shutil.copytree(folder, folder.with_name("kept"))
    return tiny


@pytest.fixture
def made(kept):
    """A folder in which both jobs have run."""
    shutil.rmtree(kept.folder)
    shutil.copytree(kept.folder.with_name("kept"), kept.folder)
    return copy.deepcopy(kept)


def changed(tiny, stages=("influence",), **flags):
    """The units and partitions whose files a run wrote, once its tables are checked."""
    before = t.snapshot(tiny.out)
    run_all(tiny, stages, **flags)
    after = t.snapshot(tiny.out)
    tiny.check(tables=stages)
    written = sorted(path for path in after if after[path] != before.get(path))
    embedded, marked, indexed = set(), set(), set()
    for path in written:
        kind, _, rest = path.partition("/")
        if kind == "embeddings" and rest.endswith(".json"):
            marked.add(rest.removesuffix(".tfrecord.json"))
        elif kind == "embeddings":
            embedded.add(rest.removesuffix(".tfrecord"))
        elif kind == "index" and rest != "plan.json":
            indexed.add(rest.split("/")[0])
    assert embedded == marked
    return embedded, indexed


def units(*shards, steps=t.STEPS):
    return {f"{shard.split('-')[0]}/{step}/{shard}" for shard in shards for step in steps}


ALL = units(*(f"train-{i}" for i in range(5)), "test-0", "test-1")
PARTS = {"part-00000", "part-00001", "part-00002"}


def test_nothing_changed(made):
    before = t.snapshot(made.out, "influence/**/*")
    assert changed(made, STAGES) == (set(), set())
    assert t.snapshot(made.out, "influence/**/*") == before


def test_what_is_known_is_not_tried_out(made, monkeypatch):
    monkeypatch.setattr(tryout, "try_out", lambda *_: pytest.fail("it was tried out"))
    assert changed(made, STAGES) == (set(), set())
    with pytest.raises(pytest.fail.Exception):
        run_all(made, top_k=99)


def test_a_new_shard(made):
    made.write("train-01.tfrecord", rows("new", 6, 50))  # in the midst of the others
    embedded, indexed = changed(made)
    assert embedded == units("train-01")
    assert indexed == {"part-00002"}  # which has room for it
    made.write("train-7.tfrecord", rows("newer", 8, 51))
    assert changed(made) == (units("train-7"), {"part-00003"})


def test_a_new_test_shard(made):
    made.write("test-2.tfrecord", rows("new", 6, 50))
    assert changed(made) == (units("test-2"), set())
    tables = {path.name for path in (made.out / "influence/test").glob("*.parquet")}
    assert tables == {f"influence-0000{i}-of-00003.parquet" for i in range(3)}


def test_a_new_checkpoint(made):
    made.write_checkpoints((10, 20, 30), (0.5, 0.25, 0.125))
    new = {unit.replace("/10/", "/30/") for unit in ALL if "/10/" in unit}
    assert changed(made, STAGES) == (new, PARTS)


def test_other_weights_at_the_same_step(made):
    made.write_checkpoints(weights=[t.weights_at(10), t.weights_at(21)])
    assert changed(made) == ({unit for unit in ALL if "/20/" in unit}, PARTS)


def test_other_learning_rates(made):
    made.write_checkpoints(rates=(0.5, 0.75))
    assert changed(made) == (set(), PARTS)


def test_a_changed_shard(made):
    made.write("train-2.tfrecord", rows("other", 8, 60))
    assert changed(made) == (units("train-2"), {"part-00001"})
    made.write("test-0.tfrecord", rows("others", 5, 61))
    assert changed(made) == (units("test-0"), set())


def test_a_removed_shard(made):
    for name in ("train-2.tfrecord", "test-1.tfrecord"):
        (made.folder / name).unlink()
        del made.shards[name]
    assert changed(made, STAGES) == (set(), {"part-00001"})
    assert made.run_json()["counts"]["train"]["shards"] == 4
    # The last shard of a partition takes it along.
    (made.folder / "train-4.tfrecord").unlink()
    del made.shards["train-4.tfrecord"]
    assert changed(made) == (set(), set())
    made.write("train-4.tfrecord", rows("train4.", 8, 4))
    embedded, indexed = changed(made)
    assert embedded == units("train-4")  # what belonged to it had gone with it
    assert len(indexed) == 1


def test_a_removed_shard_takes_its_rejected_records_along(made):
    made.write("train-5.tfrecord", [*rows("new", 5, 50), b"garbage"])
    assert made.run("embed") == 0
    made.check_counts({("train-5.tfrecord", 5): "parse failed"})
    (made.folder / "train-5.tfrecord").unlink()
    del made.shards["train-5.tfrecord"]
    assert made.run("embed") == 0
    made.check_counts({})


def test_a_deleted_embedding_file(made):
    (made.out / "embeddings/train/10/train-3.tfrecord").unlink()
    assert changed(made, top_k=99) == (units("train-3", steps=[10]), set())
    (made.out / "embeddings/test/20/test-0.tfrecord.json").unlink()
    assert changed(made) == (units("test-0", steps=[20]), set())


# Damaged. What a mark does not vouch for is made again, and that is said.


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


def halved(path):
    """To half of its records, where they are all as long."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
    path.write_bytes(b"")


def of_another_shape(path):
    path.write_text(
        json.dumps({key: [value] for key, value in json.loads(path.read_text()).items()})
    )


def a_list(path):
    path.write_text("[1]")


def cut_to_five_rows(path):
    pq.write_table(pq.read_table(path, partitioning=None)[:5], path)


def exchanged(path, other):
    """Both stay as whole as they were."""
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)


TEN = "embeddings/train/10"
EMBEDDING, MARK = f"{TEN}/train-3.tfrecord", f"{TEN}/train-3.tfrecord.json"
SELF = "self_influence/self_influence-0000{}-of-00005.parquet"
DONE, SELF_DONE = "_state/influence/test.json", "_state/self_influence.json"


@pytest.mark.parametrize(
    ("harm", "names"),
    [
        # Many at once, of files that do not hide one another's damage.
        (flipped, [EMBEDDING, "influence/test/influence-00000-of-00002.parquet"]),
        (zeroed, ["embeddings/test/20/test-0.tfrecord", "reports/test.html"]),
        (halved, [EMBEDDING, SELF.format(1)]),
        (emptied, ["reports/test.html", "embeddings/test/10/test-1.tfrecord"]),
        (cut_to_five_rows, ["influence/test/influence-00001-of-00002.parquet"]),
        (of_another_shape, [DONE, MARK, SELF_DONE]),
        (a_list, [DONE, "embeddings/test/10/test-1.tfrecord.json", SELF_DONE]),
        (
            exchanged,
            [f"{TEN}/train-1.tfrecord", f"{TEN}/train-2.tfrecord", *map(SELF.format, (1, 2))],
        ),
        (exchanged, [EMBEDDING, "embeddings/train/20/train-3.tfrecord"]),
    ],
    ids=lambda value: getattr(value, "__name__", "names"),
)
def test_damage_is_noticed_and_made_good(made, capfd, harm, names):
    expected = t.contents(made.out)
    if harm is exchanged:
        for one, other in zip(names[::2], names[1::2], strict=True):
            harm(made.out / one, made.out / other)
    else:
        for name in names:
            harm(made.out / name)
    assert t.contents(made.out) != expected
    run_all(made)
    said = capfd.readouterr().err
    assert "is made again" in said
    assert t.contents(made.out) == expected
    made.check()


def test_damage_is_noticed_where_embeddings_are_too_many_to_be_read(made, capfd, monkeypatch):
    monkeypatch.setattr(graphs, "_READ_AT_MOST", 0)
    flipped(made.out / EMBEDDING)
    run_all(made, ["self_influence"])
    assert "train-3.tfrecord: its content is another" in capfd.readouterr().err
    made.check(tables=["self_influence"])


def test_a_damaged_index_is_made_again(made, capfd):
    # The searcher is read only where the tables are made again.
    scann = sorted((made.out / "index/part-00000").glob("scann*/*"), key=lambda p: p.stat().st_size)
    zeroed(scann[-1])
    of_another_shape(made.out / "index/part-00001/partition.json")
    for path in (made.out / "evaluation/test").glob("group-*.parquet"):
        zeroed(path)
    assert changed(made, top_k=99)[0] == set()
    said = capfd.readouterr().err
    assert "part-00000" in said
    assert "part-00001" in said
    assert "evaluation/test" in said
    a_list(made.out / "index/plan.json")
    assert changed(made, top_k=98)[0] == set()
    assert "plan.json is not as it was written" in capfd.readouterr().err


def test_tables_of_a_run_with_other_flags_that_was_killed(made, start):
    where = ("tracin_beam.jobs.graphs", "write_run", 1)  # all tables are there
    job = start("influence", made.argv("influence", **FLAGS, top_k=1), exits=where)
    assert job.wait() == 9, job.said()
    run_all(made)
    made.check()


def test_another_top_k(made):
    before = t.snapshot(made.out, "evaluation/**/*")
    assert before
    assert changed(made, top_k=50) == (set(), set())
    assert t.snapshot(made.out, "evaluation/**/*") == before
    assert made.run("influence", top_k=2, **FLAGS) == 0
    assert len(t.table(made.out / "influence/test")) == 2 * 2 * 8
    assert made.run_json()["retrieval"]["k"] == 2


def test_another_test_set_shares_the_training_set(made):
    before = t.snapshot(made.out)
    assert made.run("influence", test_name="again", target="margin", **FLAGS) == 0
    other = made.run_json()["retrieval"]
    after = t.snapshot(made.out)
    assert {path: after[path] for path in before} == before
    new = {"/".join(path.split("/")[:2]) for path in set(after) - set(before)}
    folders = {f"{kind}/again" for kind in ("embeddings", "influence", "evaluation")}
    assert new == {*folders, "reports/again.html", "_state/influence"}
    # What is told of the first set is its own again.
    assert made.run("influence", **FLAGS) == 0
    assert made.run_json()["retrieval"] != other
    assert made.run_json()["config"]["test_name"] == "test"


def test_stale_tables_of_more_test_shards_are_removed(made):
    (made.folder / "test-1.tfrecord").unlink()
    del made.shards["test-1.tfrecord"]
    assert changed(made) == (set(), set())
    assert [p.name for p in (made.out / "influence/test").glob("*.parquet")] == [
        "influence-00000-of-00001.parquet"
    ]


def test_a_run_json_of_nonsense(made, capfd):
    (made.out / "run.json").write_text(json.dumps(made.run_json())[:-9])
    assert made.run("embed") == 2
    assert "run.json is not valid JSON" in capfd.readouterr().err


def test_the_dtype_of_embeddings_is_kept(tiny):
    def dtype():
        return tiny.run_json()["config"]["embedding_dtype"]

    tiny.write_all()
    assert tiny.run("embed", embedding_dtype="float32") == 0
    before = t.snapshot(tiny.out / "embeddings")
    assert tiny.run("influence") == 0
    tiny.check(tables=("influence",))
    assert dtype() == "float32"
    after = t.snapshot(tiny.out / "embeddings")
    assert {name: after[name] for name in before} == before
    # When everything is made anew, so is the choice.
    assert tiny.run("embed", seed=1, overwrite=True) == 0
    assert dtype() == "int8"
    assert tiny.run("embed", projection="none", overwrite=True) == 0
    assert dtype() == "float32"
