"""Ctrl-C and SIGTERM end a job at once, with one line, and leave nothing half done."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny as t

from tracin_beam.jobs import interrupts

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


def test_while_beam_is_being_imported(tmp_path):
    (tmp_path / "apache_beam.py").write_text(
        "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(300)"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.embed"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (done.returncode, done.stderr) == (130, "stopped before anything was done\n")


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
