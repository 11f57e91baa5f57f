"""Ctrl-C and SIGTERM end a job at once, with one line, and leave nothing half done."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import tiny as t

import tracin_beam
from tracin_beam.jobs import interrupts
from tracin_beam.storage import embeddings

ROOT = Path(__file__).parents[2]

# A job that gets a signal while a file of embeddings is half written, and whose workers then go
# on for longer than any test waits.
STOPPED = """
import os, sys, tempfile, time
from tracin_beam.storage import embeddings

def write(self, rows, original=embeddings.EmbeddingWriter.write):
    original(self, rows)
    tempfile.mkstemp()
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(300)

embeddings.EmbeddingWriter.write = write
from tracin_beam.jobs.registry import JOBS
sys.exit(JOBS["embed"].main(sys.argv[2:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_job(number, tmp_path, launch):
    job = t.Tiny(tmp_path, launch).write_all(train=2, test=1)
    (tmp_path / "temporary").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, str(number.value), *job.argv("embed")],
        env={**os.environ, "TMPDIR": str(tmp_path / "temporary"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 128 + number
    lines = [line for line in done.stderr.splitlines() if "tracin-beam " in line]
    assert len(lines) == 1
    assert "stopped by" in lines[0]
    assert "Traceback" not in done.stderr
    assert not list(job.out.rglob(".*.tmp"))
    assert not list((tmp_path / "temporary").iterdir())
    assert job.run("self_influence") == 0
    job.check(tables=["self_influence"])


# Waits in a worker process, and says that it does.
WAITS = t.TASK.replace(
    "    columns = {",
    """    import sys, time
    def wait(x):
        if "sdk_worker" in sys.argv[0]:
            open("@waiting", "w").close()
            time.sleep(300)
        return x
    serialized = tf.ensure_shape(tf.py_function(wait, [serialized], tf.string), [None])
    columns = {""",
)


@pytest.mark.parametrize("everybody", [True, False])
def test_a_signal_ends_worker_processes(everybody, tmp_path):
    """As Ctrl-C in a terminal, which all processes get; or for the launcher alone."""
    job = t.Tiny(tmp_path).write_all(train=2, test=1)
    (tmp_path / "temporary").mkdir()
    (tmp_path / "task.py").write_text(WAITS.replace("@", f"{tmp_path}/"))
    process = subprocess.Popen(
        [sys.executable, "-m", "tracin_beam", "embed", *job.argv("embed"), "--runner=FnApiRunner",
         "--direct_running_mode=multi_processing", "--direct_num_workers=2"],
        env={**os.environ, "TMPDIR": str(tmp_path / "temporary"), "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )  # fmt: skip
    while not (tmp_path / "waiting").exists() and process.poll() is None:
        time.sleep(0.05)
    started = descendants(process.pid)
    if everybody:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + (signal.SIGINT if everybody else signal.SIGTERM), said
    assert len(started) >= 2
    assert not [pid for pid in started if is_running(pid)]
    lines = [line for line in said.splitlines() if "tracin-beam " in line]
    assert len(lines) == 1
    assert "stopped by" in lines[0]
    assert "Traceback" not in said
    assert not list(job.out.rglob(".*.tmp"))
    assert not list((tmp_path / "temporary").iterdir())


def descendants(pid):
    """The processes that a process has started, and theirs."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = {int(child) for listing in tasks for child in listing.read_text().split()}
    return children.union(*map(descendants, children))


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("command", [["pipelines.embed"], ["tracin_beam", "embed"]])
def test_while_beam_is_being_imported(command, tmp_path):
    (tmp_path / "apache_beam.py").write_text(
        "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(300)"
    )
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (done.returncode, done.stderr) == (130, "stopped before anything was done\n")


def test_a_function_that_is_interrupted_leaves_nothing_unfinished(tmp_path, monkeypatch, capfd):
    job = t.Tiny(tmp_path).write_all(train=3, test=0)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    original, asked, told = embeddings.EmbeddingWriter.write, [], threading.Lock()

    def write(self, rows):
        original(self, rows)
        asked.append(True)
        if len(asked) >= 2 and told.acquire(blocking=False):
            os.kill(os.getpid(), signal.SIGINT)
            # The worker goes on, while the main thread is told.
            time.sleep(0.3)

    # A shell lets what it starts in the background ignore it.
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        patch.setattr(embeddings.EmbeddingWriter, "write", write)
        with pytest.raises(KeyboardInterrupt):
            tracin_beam.self_influence(**job.flags("self_influence"), progress=False)
    signal.signal(signal.SIGINT, earlier)
    there = t.snapshot(job.out)
    assert not list(job.out.rglob(".*.tmp"))
    assert not list((job.out / "_state").rglob("*.json"))
    ours = [p for p in (tmp_path / "temporary").iterdir() if "__autograph_" not in p.name]
    assert not ours
    said = capfd.readouterr().err
    assert "Traceback" not in said
    # No worker goes on in secret, and what was done counts.
    assert t.snapshot(job.out) == there
    tracin_beam.self_influence(**job.flags("self_influence"), progress=False)
    job.check(tables=["self_influence"])
    after = t.snapshot(job.out)
    done = {path for path in there if path.endswith(".tfrecord.json")}
    assert done
    assert all(after[path] == there[path] for path in done)


def test_handlers_are_put_back():
    earlier = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with interrupts.handled("x"):
        assert signal.getsignal(signal.SIGINT) != earlier[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == earlier


def test_processes_that_it_has_started_end_too():
    program = "import time; time.sleep(300)"
    shell = subprocess.Popen(f"{sys.executable} -c '{program}'; true", shell=True)
    interrupts._kill_workers()
    assert shell.wait(60) == -signal.SIGKILL
