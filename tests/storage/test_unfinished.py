"""What a process leaves behind when it ends: nothing."""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from tracin_beam.storage import files, unfinished


def test_temporary_files_go_with_their_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with unfinished.temporary_folder():
        folder = Path(tempfile.gettempdir())
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o777 == 0o700
        program = "import tempfile; print(tempfile.mkdtemp())"
        made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert Path(made.stdout.strip()).parent == folder
    assert tempfile.gettempdir() == str(tmp_path)
    assert not list(tmp_path.iterdir())
    assert os.environ.get("TMPDIR") != str(folder)


def test_unfinished_files_are_discarded(tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "_stopped", threading.Event())
    half, end = threading.Event(), threading.Event()

    def write():
        with contextlib.suppress(KeyError), files.atomic_write(str(tmp_path / "x")) as handle:
            handle.write(b"half")
            half.set()
            end.wait()
            raise KeyError("the process would have ended")

    writer = threading.Thread(target=write)
    writer.start()
    half.wait()
    assert len(list(tmp_path.iterdir())) == 1
    with unfinished.temporary_folder():
        folder = tempfile.gettempdir()
        unfinished.discard(files.remove)
        assert not os.path.exists(folder)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InterruptedError), files.atomic_write(str(tmp_path / "y")):
        pass  # no further file is begun
    end.set()
    writer.join()
    assert not list(tmp_path.iterdir())


CHILD = """
import sys, time
from tracin_beam.storage import files
with files.atomic_write(sys.argv[1]) as handle:
    print("half", flush=True)
    time.sleep(300)
"""


def test_those_of_worker_processes_too(tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "_stopped", threading.Event())
    with unfinished.temporary_folder():
        command = [sys.executable, "-c", CHILD, str(tmp_path / "x")]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert worker.stdout.readline() == b"half\n"
        worker.kill()
        worker.communicate()
        assert len(list(tmp_path.iterdir())) == 1
        unfinished.discard(files.remove)
    assert not list(tmp_path.iterdir())


HOLDER = """
import tempfile, time
from tracin_beam.storage import unfinished
with unfinished.temporary_folder():
    print(tempfile.gettempdir(), flush=True)
    time.sleep(300)
"""


def test_temporary_folders_of_killed_processes_are_removed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(unfinished, "_YOUNG", -1.0)
    (tmp_path / "tracin-of-somebody").mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    folder = Path(holder.stdout.readline().strip())
    with unfinished.temporary_folder():
        assert folder.exists()
    holder.kill()
    holder.communicate()
    with unfinished.temporary_folder():
        assert not folder.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["tracin-of-somebody"]
