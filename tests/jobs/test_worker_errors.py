"""What a worker says comes back as one sentence, whatever the runner makes of it."""

import errno
import os
import re
import resource
import shutil
import subprocess
import threading
import traceback

import pytest
import tiny as t

from tracin_beam.errors import InputError
from tracin_beam.jobs import worker_errors
from tracin_beam.jobs.registry import JOBS
from tracin_beam.storage import files


def trace_of(error):
    """What a worker sends of an error: the trace that one of its threads prints."""
    found = []

    def work():
        try:
            raise error
        except Exception:
            found.append(traceback.format_exc())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


JAVA = (
    "Job 7 failed: java.lang.RuntimeException: Error received from SDK harness for instruction 5: "
    "{}\n\tat org.apache.beam.runners.Bundle.run(Bundle.java:10)\nCaused by: java.io.IOException"
)


@pytest.mark.parametrize("runner", ["{}", JAVA, "before\n{}\nafter"])
@pytest.mark.parametrize(
    "message", ["a.tfrecord: cut short", 'two\nlines, "quotes" [while] {braces}: \\ and ü', ""]
)
def test_an_input_error_is_found_by_its_mark(runner, message):
    text = runner.replace("{}", trace_of(InputError(message)))
    found = worker_errors.of(RuntimeError(text))
    assert isinstance(found, InputError)
    assert str(found) == message


def test_the_mark_is_seen_in_workers_only():
    assert not InputError("x").__notes__
    assert "Note" not in "".join(traceback.format_exception(InputError("x")))


def test_another_error_is_said_with_its_step():
    text = JAVA.replace("{}", trace_of(ZeroDivisionError("by zero [while running 'Embed/Unit']")))
    found = worker_errors.of(RuntimeError(text))
    assert isinstance(found, worker_errors.Failed)
    said = str(found)
    assert said.startswith("the job failed in the step Embed/Unit: ZeroDivisionError: by zero. ")
    assert "\n" not in said
    assert "TRACIN_TRACE=1" in said


class LostConnection(Exception):
    """As gRPC's."""

    def __str__(self):
        return (
            "<_MultiThreadedRendezvous of RPC that terminated with:\n\tstatus = "
            'StatusCode.UNAVAILABLE\n\tdetails = "Socket closed"\n\tdebug = "..."\n>'
        )


def test_a_runner_that_is_gone_is_said():
    said = str(worker_errors.of(LostConnection()))
    assert "the runner cannot be reached any more (UNAVAILABLE: Socket closed)" in said
    assert "\n" not in said


@pytest.mark.parametrize(("name", "shown"), [("apache_beam/x.py", False), ("mine.py", True)])
def test_only_traces_of_beams_threads_are_not_shown(name, shown, monkeypatch):
    caught = []
    monkeypatch.setattr(threading, "excepthook", caught.append)
    with worker_errors.without_traces():
        thread = threading.Thread(target=exec, args=[compile("1 / 0", name, "exec")])
        thread.start()
        thread.join()
    assert len(caught) == shown
    assert threading.excepthook == caught.append


def test_memory_that_does_not_suffice_is_said():
    text = trace_of(MemoryError("Unable to allocate 8 GiB"))
    assert "smaller --batch_size" in str(worker_errors.of(RuntimeError(text)))


@pytest.fixture
def job(tmp_path, launch):
    return t.Tiny(tmp_path, launch).write_all(train=1, test=1)


def says(capfd, status, pattern, code=2):
    """The command has ended with one sentence, and with nothing else that looks like a trace."""
    said = capfd.readouterr().err
    assert status == code, said
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("tracin-beam ")]
    assert len(lines) == 1, said
    assert re.search(pattern, lines[0]), lines
    return lines[0]


class Full:
    """A file on a disk that takes no more after some bytes."""

    def __init__(self, handle, room, number=errno.ENOSPC):
        self.handle, self.room, self.number = handle, room, number

    def __getattr__(self, name):
        return getattr(self.handle, name)

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(self.number, os.strerror(self.number))
        return self.handle.write(data)


@pytest.mark.parametrize(
    "name", ["run.json", "train-0.tfrecord", "influence-00000-of-00001.parquet", "test.html"]
)
def test_a_full_disk(name, job, monkeypatch, capfd):
    create = files.FileSystems.create

    def fill(path, **kwargs):
        handle = create(path, **kwargs)
        return Full(handle, 100) if os.path.basename(path).startswith(f".{name}") else handle

    monkeypatch.setattr(files.FileSystems, "create", fill)
    status = job.run("influence")
    said = says(capfd, status, "the disk is full; free some space, or choose another place")
    assert f"{name}" in said
    assert not list(job.folder.rglob(".*.tmp"))
    monkeypatch.undo()
    assert job.run("influence") == 0
    job.check(tables=["influence"])


@pytest.mark.parametrize(
    ("number", "what"),
    [(errno.EDQUOT, "the quota of the disk is used up"), (errno.EIO, "the disk fails")],
    ids=["quota", "failing"],
)
def test_a_disk_that_takes_no_more(number, what, job, monkeypatch, capfd):
    create = files.FileSystems.create
    with monkeypatch.context() as patch:
        patch.setattr(
            files.FileSystems,
            "create",
            lambda path, **kwargs: Full(create(path, **kwargs), 100, number),
        )
        status = job.run("embed")
    says(capfd, status, what)
    assert not list(job.folder.rglob(".*.tmp"))


def test_a_limit_on_the_size_of_files(job, capfd):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        status = job.run("embed", dim=16384)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = says(capfd, status, "larger than is allowed here; raise the limit")
    assert "train-0.tfrecord" in said or "test-0.tfrecord" in said
    assert not list(job.folder.rglob(".*.tmp"))
    assert job.run("embed", dim=16384) == 0


@pytest.fixture
def read_only(tmp_path):
    """A folder on a file system that cannot be written to."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "none", str(folder)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_file_system(job, read_only, capfd):
    status = job.run("embed", output=read_only / "out")
    says(capfd, status, "the file system is read-only; choose another place")


def test_a_mistake_in_the_code(job, monkeypatch, capfd):
    from tracin_beam.stages import embed

    def fails(*args):
        raise KeyError("nobody thought of this")

    monkeypatch.setattr(embed, "embed_unit", fails)
    says(capfd, job.run("embed"), "failed in the step Embed/EmbedUnit: KeyError.*nobody", code=1)


def test_an_unknown_runner(job, capfd):
    status = JOBS["embed"].main([*job.argv("embed"), "--runner=NoSuchRunner"])
    says(capfd, status, "--runner=NoSuchRunner is not known")


def test_a_dim_that_no_memory_holds(job, capfd):
    says(capfd, job.run("embed", dim=1_000_000_000), "--dim=1000000000 must be at most")


def test_a_long_name_is_cut(job):
    long = "train-" + "ü" * 115 + ".tfrecord"
    assert len(long.encode()) > 240
    job.write(long, t.rows("long", 8, 7))
    assert job.run("influence") == 0
    job.check(tables=["influence"])


def test_names_that_cannot_be_used(job, capfd):
    content = (job.folder / "train-0.tfrecord").read_bytes()
    strange = os.fsencode(job.folder) + b"/train-\xff.tfrecord"
    with open(strange, "wb") as handle:
        handle.write(content)
    says(capfd, job.run("embed"), r"train-\\udcff.tfrecord' has a name that is not UTF-8")
    os.unlink(strange)
    os.mkfifo(job.folder / "train-fifo.tfrecord")
    says(capfd, job.run("embed"), "train-fifo.tfrecord is no regular file but a pipe")
    alone = job.folder / "train-fifo.tfrecord"
    says(capfd, job.run("embed", train=alone), "train-fifo.tfrecord is no regular file but a pipe")
    alone.unlink()
    says(capfd, job.run("embed", output=f"{job.folder}/\udcff"), r"--output .*\\udcff.*UTF-8")
    says(capfd, job.run("embed", test_name="x" * 250), "--test_name=x.* take a plain name")
    says(capfd, job.run("embed", output=job.folder / ("x" * 300)), "the name is too long")
