"""Several runs on one output at once, and input that changes while a run is at work."""

import time

import pytest
import tiny as t
from tiny import Tiny, rows

# Waits where a file says so, and says that it does.
WAITING = t.TASK.replace(
    "    columns = {",
    """    import os, time
    def wait(x):
        while os.path.exists("@wait"):
            open("@waiting", "w").close()
            time.sleep(0.01)
        return x
    serialized = tf.ensure_shape(tf.py_function(wait, [serialized], tf.string), [None])
    columns = {""",
)


@pytest.fixture
def tiny(tmp_path, launch):
    made = Tiny(tmp_path, launch).write_all()
    (tmp_path / "task.py").write_text(WAITING.replace("@", f"{tmp_path}/"))
    return made


def wait_for(condition, job):
    while not condition() and job.running():
        time.sleep(0.02)
    assert job.running(), job.said()


def test_two_test_sets_at_once_and_one_twice(tiny, start):
    def begin(stage, **flags):
        return start(stage, tiny.argv(stage, index_rows=16, **flags))

    first = begin("influence")
    wait_for((tiny.out / "run.json").exists, first)
    others = [
        begin("influence", test_name="again"),
        begin("self_influence"),
        begin("influence"),
    ]
    statuses = [job.wait() for job in [first, *others]]
    assert statuses[:3] == [0, 0, 0], [job.said() for job in [first, *others]]
    # By then the first may have ended; it never works beside it.
    if statuses[3]:
        assert statuses[3] == 2
        said = others[2].said()
        assert said.count("another run is at work in the output, influence of the test set") == 1
        assert "Traceback" not in said
    for name in ("test", "again"):
        t.check_influence(tiny, tiny.good("train"), tiny.good("test"), name)
    t.check_self_influence(tiny, tiny.good("train"))
    state = tiny.run_json()
    assert set(state["sets"]) == set(state["counts"]) == {"train", "test", "again"}
    assert set(state["timings"]) == {"influence", "self_influence"}
    left = [p for p in tiny.out.rglob("*") if p.name.endswith(".tmp") or "running" in str(p)]
    assert [p for p in left if p.is_file()] == []


def test_settings_that_differ_do_not_go_together(tiny, start, capfd):
    slow = tiny.folder / "wait"
    job = start("influence", tiny.argv("influence"))
    wait_for((tiny.out / "run.json").exists, job)
    slow.touch()
    try:
        wait_for((tiny.folder / "waiting").exists, job)
        # The task of this process must not wait.
        (tiny.folder / "other.py").write_text(t.TASK)
        task = f"{tiny.folder}/other.py:task"
        assert tiny.run("self_influence", task=task, overwrite=True) == 2
        said = capfd.readouterr().err
        assert "another run is at work in the output, influence of the test set 'test'" in said
        assert "wait for it" in said
    finally:
        slow.unlink()
    assert job.wait() == 0, job.said()
    tiny.check(tables=["influence"])


# Input that changes.


@pytest.mark.parametrize(
    "name", ["train-1.tfrecord", "test-0.tfrecord", "ckpts/00000020.weights.h5"]
)
def test_input_that_changes_after_it_was_embedded(tiny, monkeypatch, capfd, name):
    from tracin_beam.storage import runs

    kept = runs.write_unit
    path = tiny.folder / name
    content = path.read_bytes()

    def and_then(output, result):
        kept(output, result)
        path.write_bytes(content[: len(content) // 2])

    monkeypatch.setattr(runs, "write_unit", and_then)
    assert tiny.run("influence") == 2
    said = capfd.readouterr().err
    assert f"{path} changed" in said
    assert not list((tiny.out / "influence").rglob("*.parquet"))
    monkeypatch.undo()
    path.write_bytes(content)
    assert tiny.run("influence") == 0
    tiny.check(tables=["influence"])


def test_a_shard_that_is_replaced_while_others_are_embedded(tiny, monkeypatch, capfd):
    from tracin_beam.stages import embed

    kept = embed.embed_unit

    def after(output, source, unit, *others):
        if unit.shard.name == "train-1.tfrecord" and not (tiny.folder / "done").exists():
            (tiny.folder / "done").touch()
            tiny.write("train-1.tfrecord", rows("others", 8, 77))
        return kept(output, source, unit, *others)

    monkeypatch.setattr(embed, "embed_unit", after)
    assert tiny.run("self_influence") == 2
    assert "train-1.tfrecord changed while it was used" in capfd.readouterr().err
    assert tiny.run("self_influence") == 0
    tiny.check(tables=["self_influence"])
