"""Shards, checkpoints and output on another file system, and workers in other processes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import processes
import tiny as t
from remote_files import PREFIX
from tiny import Tiny, rows

from tracin_beam.inputs.task import load_task

ROOT = Path(__file__).parents[2]


def test_everything_remote(tmp_path, launch):
    tiny = Tiny(tmp_path, launch, prefix=PREFIX)
    tiny.write_all(packed=True)
    tiny.write("train-3.tfrecord", [*rows("more", 9, 5), b"garbage"])
    rejected = {("train-3.tfrecord", 9): "parse failed"}
    for stage in ("influence", "self_influence"):
        assert tiny.run(stage, index="scann", index_rows=16) == 0
    tiny.check(rejected)
    made = t.contents(tiny.out)
    assert "reports/test.html" in made
    # Nothing is left that a local run would not leave, and its numbers are the same.
    local = Tiny(tmp_path, launch)
    local.shards = {
        name: [row.but(shard=local.path(name)) if isinstance(row, t.Row) else row for row in some]
        for name, some in tiny.shards.items()
    }
    shutil.rmtree(tiny.out)
    for stage in ("influence", "self_influence"):
        assert local.run(stage, index="scann", index_rows=16) == 0
    local.check(rejected)
    here = t.contents(local.out)
    assert set(here) == set(made)
    for path, content in here.items():
        if path.endswith(".tfrecord"):
            assert content == made[path]


def test_resuming_remotely(tmp_path, launch, capfd):
    tiny = Tiny(tmp_path, launch, prefix=PREFIX).write_all()
    assert tiny.run("influence", index="scann", index_rows=16) == 0
    before = t.snapshot(tiny.out)
    assert tiny.run("influence", index="scann", index_rows=16) == 0
    assert t.snapshot(tiny.out) == before
    tiny.write("train-3.tfrecord", rows("new", 5, 50))
    tiny.write("test-1.tfrecord", rows("others", 6, 51))
    assert tiny.run("influence", index="scann", index_rows=16) == 0
    tiny.check(tables=["influence"])
    after = t.snapshot(tiny.out)
    written = {path for path in after if after[path] != before.get(path)}
    assert {path.rpartition("/")[2] for path in written if path.startswith("embeddings")} == {
        "train-3.tfrecord", "train-3.tfrecord.json", "test-1.tfrecord", "test-1.tfrecord.json"
    }  # fmt: skip
    assert not [path for path in written if path.startswith("index/part-00000")]
    assert tiny.run("influence", index="scann", index_rows=16, seed=3) == 2
    assert t.snapshot(tiny.out) == after
    # The file system knows that a file has other content, though it is as long as it was.
    path = tiny.out / "embeddings/train/10/train-0.tfrecord"
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))
    assert tiny.run("influence", index="scann", index_rows=16) == 0
    assert "train-0.tfrecord: its content is another" in capfd.readouterr().err
    assert path.read_bytes() == content
    assert tiny.run("influence", index="scann", index_rows=16, seed=3, overwrite=True) == 0
    tiny.check(tables=["influence"])


HELPER = """
import keras

def build_model():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="scores")])
"""


def with_helper(tiny):
    """A task that imports its model from a module beside it, and only when it is built."""
    task = tiny.folder / "task.py"
    head, _, tail = t.TASK.partition("def build_model():")
    _, _, rest = tail.partition('name="scores")])\n')
    late = "def build_model():\n    import tiny_helper\n    return tiny_helper.build_model()\n"
    task.write_text(head + late + rest)
    (tiny.folder / "tiny_helper.py").write_text(HELPER)
    return f"{task}:task"


def test_workers_in_other_processes(tmp_path):
    tiny = Tiny(tmp_path).write_all()
    task = with_helper(tiny)
    flags = ["--runner=FnApiRunner", "--direct_running_mode=multi_processing"]
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.influence", *tiny.argv("influence", task=task), *flags,
         "--direct_num_workers=2"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tiny.check(tables=["influence"])


ELSEWHERE = """
import sys
task = source.load()
assert source.load() is task
model = task.model()
assert model.output_shape == (None, 3), model.output_shape
result = sys.modules["tiny_helper"].__file__
"""


def test_a_task_reaches_a_machine_that_does_not_have_it(tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    tiny = Tiny(here)
    task, source = load_task(with_helper(tiny))
    task.model()
    sent = source()
    assert sorted(path for path, _ in sent.files) == ["task.py", "tiny_helper.py"]

    def load():
        return processes.result_of(ELSEWHERE, source=sent)

    # Where the same files are, they are taken; where they are not, or others, they are brought.
    assert load() == str(here / "tiny_helper.py")
    (here / "tiny_helper.py").write_text("raise ImportError('of another day')")
    assert str(here) not in load()
    shutil.rmtree(here)
    assert str(here) not in load()


def test_a_task_and_its_files_are_remote(tmp_path, launch):
    tiny = Tiny(tmp_path, launch).write_all(train=1, test=0)
    (tmp_path / "scale.txt").write_text("1.0")
    reads = (
        t.TASK.replace(
            "def build_model",
            """import os
HERE = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(HERE, "scale.txt")) as file:
    SCALE = float(file.read())

def build_model""",
        )
        .replace('example["x"],', 'SCALE * example["x"],')
        .replace("parse)", 'parse, files=["scale.txt"])')
    )
    (tmp_path / "task.py").write_text(reads)
    task = f"{PREFIX}{tmp_path}/task.py:task"
    assert tiny.run("self_influence", task=task) == 0
    tiny.check(tables=["self_influence"])
    before = t.snapshot(tiny.out)
    assert tiny.run("self_influence", task=task) == 0
    assert t.snapshot(tiny.out) == before
    (tmp_path / "scale.txt").write_text("2.0")
    assert tiny.run("self_influence", task=task) == 2
