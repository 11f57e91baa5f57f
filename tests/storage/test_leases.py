"""Of runs that begin together one goes on, on any file system; what the dead held is taken over."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time

import pytest
import remote_files

from tracin_beam.storage import files, leases
from tracin_beam.storage.leases import Taken


@pytest.fixture(params=["", remote_files.PREFIX], ids=["local", "remote"])
def folder(request, tmp_path):
    return f"{request.param}{tmp_path}/leases"


def held(folder, *claims, shared=""):
    return leases.held(folder, "a job", claims, shared)


def names(folder):
    return list(files.under(folder))


def test_what_one_has_no_other_gets(folder):
    with held(folder, "a", "b") as lease:
        assert lease.is_held()
        with pytest.raises(Taken, match=f"a job, process {os.getpid()} of .* wait for it"):
            held(folder, "b", "c").__enter__()
        with held(folder, "c"):
            assert len(names(folder)) == 2
            with pytest.raises(Taken):
                held(folder, "*").__enter__()
    assert names(folder) == []
    with held(folder, "*"), pytest.raises(Taken):
        held(folder, "z").__enter__()


def test_who_works_together_has_the_same_in_common(folder):
    with (
        held(folder, "a", shared="x"),
        held(folder, "b", shared="x"),
        pytest.raises(Taken, match="with other training data"),
    ):
        held(folder, "c", shared="y").__enter__()


def test_of_many_at_once_one_at_a_time(folder):
    inside, most, entered = [], [], []

    def work():
        for _ in range(3):
            with leases.waited_for(folder, "counting", "a"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.01)
                inside.pop()
                entered.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (max(most), len(entered)) == (1, 12)
    assert names(folder) == []


def test_a_killed_process_loses_its_lease_at_once(folder):
    script = (
        "import sys, time, remote_files\nfrom tracin_beam.storage import leases\n"
        "with leases.held(sys.argv[1], 'a job', ('a',)): print('held', flush=True); time.sleep(99)"
    )
    path = os.pathsep.join(sys.path)
    process = subprocess.Popen(
        [sys.executable, "-c", script, folder],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(Taken, match=str(process.pid)):
            held(folder, "a").__enter__()
    finally:
        process.kill()
        process.wait()
    with held(folder, "a"):
        pass
    assert names(folder) == []


def elsewhere(folder, age, **changes):
    """The lease of a run on another machine, whose last sign of life is some seconds old."""
    token = f"{time.time_ns() - 10**12:020d}-0123456789ab"
    stored = {
        "token": token, "owner": "somebody", "host": "elsewhere", "machine": "other", "pid": 1,
        "born": "1", "job": "a job", "claims": ["a"], "shared": "", "holds": True,
        "detached": False, "beat": 3, "time": time.time() - age, **changes,
    }  # fmt: skip
    path = files.join(folder, token + ".json")
    files.write_json(path, stored)
    return path, stored


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(leases, "BEAT", 0.1)


@pytest.mark.usefixtures("quick")
def test_another_machine_is_taken_at_its_word_until_it_falls_silent(folder):
    path, _ = elsewhere(folder, 5)
    with pytest.raises(Taken, match="somebody on elsewhere"):
        held(folder, "a").__enter__()
    files.remove([path])
    elsewhere(folder, 1000)
    with held(folder, "a"):
        assert len(names(folder)) == 1


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("age", [1000, -1000], ids=["behind", "ahead"])
def test_clocks_that_differ(folder, age):
    path, stored = elsewhere(folder, age)
    ended = threading.Event()

    def beat():
        while not ended.wait(0.02):
            stored["beat"] += 1
            files.write_json(path, stored)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(Taken):
            held(folder, "a").__enter__()
    finally:
        ended.set()
        thread.join()
    with held(folder, "a"):  # and once it has ended
        pass


@pytest.mark.usefixtures("quick")
def test_a_holder_that_was_taken_for_dead_knows(folder):
    with held(folder, "a") as lease:
        files.remove([lease.path])
        time.sleep(0.3)
        assert not lease.is_held()
        assert names(folder) == []


def test_a_job_without_its_launcher_keeps_it(folder):
    with held(folder, "a") as lease:
        lease.detached = True
    with pytest.raises(Taken, match=r"goes on without its launcher; if it has failed, remove"):
        held(folder, "a").__enter__()
    with contextlib.suppress(ZeroDivisionError), held(folder, "b") as lease:
        lease.detached = True
        raise ZeroDivisionError
    assert len(names(folder)) == 1


def test_what_is_no_lease_is_removed(folder):
    for name, content in (("x.json", []), ("y.json", {"token": "y"}), ("z.json", {"pid": "1"})):
        files.write_json(files.join(folder, name), content)
    with files.atomic_write(files.join(folder, "half.json")) as handle:
        handle.write(b'{"to')
    with held(folder, "a") as lease:
        assert names(folder) == [lease.path]
        assert json.loads(files.open_read(lease.path).read())["holds"] is True
