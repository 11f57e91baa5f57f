"""The same job, on every engine and with one worker or two, makes the same tables."""

import contextlib
import os
import threading

import engines
import pytest
import sockets
import tiny as t

# Of workers in this process whose engine has ended.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

PLACES = [
    ("job_service", 1),
    ("job_service", 2),
    ("prism", 2),  # which has no number of workers
    ("flink", 1),
    ("flink", 2),
    ("flink_cluster", 1),
    ("flink_cluster", 2),
    ("spark", 1),
    ("spark", 2),
]


@pytest.fixture(
    params=[
        pytest.param((name, workers), marks=pytest.mark.engine(name), id=f"{name}-{workers}")
        for name, workers in PLACES
    ]
)
def place(request, tmp_path):
    """An engine's name, number of workers and flags; it must be reachable by loopback only."""
    name, workers = request.param
    (tmp_path / "engine").mkdir()
    with engines.running(name, tmp_path / "engine", workers) as engine, addresses(engine) as found:
        yield name, workers, engine.flags
    assert found
    assert found <= {"127.0.0.1", "::1"}


@contextlib.contextmanager
def addresses(engine):
    """The addresses that an engine's processes, and this one, listen at, at any time."""
    found, before, ended = set(), set(sockets.listening()), threading.Event()

    def look():
        while not ended.wait(0.3):
            # A process may end while it is looked at.
            with contextlib.suppress(OSError):
                every = {*sockets.listening(os.getpid(), *engine.pids())}
                found.update(address for address, _ in every - before)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()


def test_tables_are_those_of_the_direct_runner(place, job, tmp_path, monkeypatch, capfd):
    name, workers, flags = place
    # As few jobs as will do, above all on the cluster, where each takes long.
    stages = ["influence", "self_influence"] if workers == 2 else ["influence"]
    if name == "flink_cluster":
        stages = ["influence"] if workers == 2 else ["self_influence"]
    # The workers' current directory is another one.
    monkeypatch.chdir(job.tiny.folder)
    relative = {"train": "train-*", "checkpoints": "ckpts", "task": "task.py:task"}
    out = os.path.relpath(tmp_path / "out")
    made = []
    for stage in stages:
        test = {"test": "test-*"} if stage == "influence" else {}
        done = job.run(stage, flags, output=out, **relative, **test)
        assert done == 0, capfd.readouterr().err
        made.append(t.snapshot(tmp_path / "out", "embeddings/**/*"))
    job.check(out)
    assert not [path for path in (tmp_path / "out").rglob(".*") if path.is_file()]
    # What the first job had embedded the second did not embed again.
    assert made[0] == made[-1]
    if stages == ["influence"]:
        return

    # A worker's error comes back as a sentence. The cluster would try the same again and again.
    once = ["--number_of_execution_retries=0"] if name == "flink_cluster" else []
    capfd.readouterr()
    strict = {"output": tmp_path / "strict", "test": None, "max_rejected": 0}
    assert job.run("embed", [*flags, *once], **strict) == 2
    said = capfd.readouterr().err
    assert "tracin-beam embed: 2 of 24 records of the train set could not be used" in said
