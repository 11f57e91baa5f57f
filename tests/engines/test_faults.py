"""Machines and processes that die while they work: nothing is lost or counted twice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import engines
import pytest
import tiny as t
from job import FLAGS, make_job

pytestmark = pytest.mark.engine("flink_cluster")

# Every batch takes a while, as long as there is a file that says so.
SLOW = t.TASK.replace(
    "    columns = {",
    """    import os, time
    def wait(x):
        time.sleep(1.0 if os.path.exists("@slow") else 0.0)
        return x
    serialized = tf.py_function(wait, [serialized], tf.string)
    serialized = tf.ensure_shape(serialized, [None])
    columns = {""",
)


@pytest.fixture(scope="module")
def slow_job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slow")
    return make_job(folder, SLOW.replace("@slow", str(folder / "slow")))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with engines.running("flink_cluster", tmp_path_factory.mktemp("cluster")) as started:
        yield started


def lose_task_manager(cluster):
    """A machine is switched off, and a new one takes its place, as Kubernetes sees to."""
    cluster.kill("task-manager-0")
    engines.start_task_manager(cluster, "task-manager-0")


def lose_worker(cluster):
    """An SDK process dies, as of memory."""
    manager = cluster.pid("task-manager-1")
    *_, worker = engines.descendants(manager) or engines.descendants(cluster.pid("task-manager-0"))
    os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize(
    ("lose", "stage", "units"),
    [(lose_task_manager, "influence", 10), (lose_worker, "self_influence", 6)],
)
def test_lost_while_it_embeds(cluster, slow_job, tmp_path, lose, stage, units):
    slow, out = slow_job.tiny.folder / "slow", tmp_path / "out"
    slow.touch()
    argv = slow_job.tiny.argv(stage, **FLAGS, output=out)
    process = subprocess.Popen(
        [sys.executable, "-m", f"pipelines.{stage}", *argv, *cluster.flags],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while len(done := marks(out)) < 3 and process.poll() is None:
            time.sleep(0.02)
        lose(cluster)
        slow.unlink()
        said = process.communicate(timeout=400)[1]
    finally:
        process.kill()
        process.wait()
    assert 3 <= len(done) < units, said
    assert process.returncode == 0, said
    slow_job.check(out)
    assert {path: marks(out)[path] for path in done} == done


def marks(out):
    return {
        path: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in (out / "embeddings").rglob("[!.]*.json")
    }
