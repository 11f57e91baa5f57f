"""What a process must not leave behind: unfinished files and its temporary folder."""

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator

_lock = threading.Lock()
_removers: dict[str, Callable[[], None]] = {}
_stopped = threading.Event()
_folders: list[str] = []
# The folder in which worker processes of this machine note the files that they have begun, for the
# process that ends them all.
_NOTES = "TRACIN_UNFINISHED"
_PREFIX = "tracin-"
_LOCK = ".of-a-run"
_YOUNG = 10.0  # seconds


@contextlib.contextmanager
def file(path: str, remove: Callable[[], None]) -> Iterator[None]:
    """In this block there is an unfinished file at `path`, which `remove` removes."""
    with _lock:
        _removers[path] = remove
    try:
        if _stopped.is_set():
            raise InterruptedError(f"{path}: the run was interrupted")
        with _noted(path):
            yield
    finally:
        with _lock:
            _removers.pop(path, None)


@contextlib.contextmanager
def _noted(path: str) -> Iterator[None]:
    """In this block a note tells the launcher of the file that a worker process has begun."""
    folder = os.environ.get(_NOTES, "")
    if folder in ("", *_folders) or not os.path.isdir(folder):
        yield  # this process ends by itself what it has begun
        return
    note = os.path.join(folder, f"unfinished-{uuid.uuid4().hex}")
    with open(note, "w", encoding="utf-8") as handle:
        handle.write(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.remove(note)


@contextlib.contextmanager
def temporary_folder() -> Iterator[None]:
    """In this block temporary files, of other packages and child processes too, lie in one folder.

    The folder is private to the user, and is removed with all that is in it; so are those of
    processes that were killed.

    Raises:
      OSError: there is no place for it.
    """
    _remove_of_killed(tempfile.gettempdir())
    earlier = tempfile.tempdir, {name: os.environ.get(name) for name in ("TMPDIR", _NOTES)}
    folder = tempfile.mkdtemp(prefix=_PREFIX)
    # For as long as this process lives, whatever becomes of it.
    lock = open(os.path.join(folder, _LOCK), "w")  # noqa: SIM115
    with contextlib.suppress(OSError):  # on a file system that has no locks none is removed either
        fcntl.flock(lock, fcntl.LOCK_EX)
    _folders.append(folder)
    tempfile.tempdir = os.environ["TMPDIR"] = os.environ[_NOTES] = folder
    try:
        yield
    finally:
        tempfile.tempdir = earlier[0]
        for name, value in earlier[1].items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        _folders.remove(folder)
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def _remove_of_killed(parent: str) -> None:
    """Removes temporary folders whose processes have died without a chance to remove them."""
    for path in glob.glob(os.path.join(glob.escape(parent), _PREFIX + "*", _LOCK)):
        with contextlib.suppress(OSError), open(path, "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A folder of this moment may not be locked yet.
            if time.time() - os.fstat(lock.fileno()).st_mtime > _YOUNG:
                shutil.rmtree(os.path.dirname(path), ignore_errors=True)


def begin() -> None:
    """Lets files be begun again, for another run after one that was interrupted."""
    _stopped.clear()


@contextlib.contextmanager
def tidied(remove: Callable[[Iterable[str]], None], seconds: float = 2.0) -> Iterator[None]:
    """In this block Ctrl-C raises KeyboardInterrupt when nothing unfinished is left.

    Workers are threads that go on until they would begin the next file, which they cannot before
    `begin`; they are waited for.

    Args:
      remove: removes files that worker processes have left.
      seconds: how long to wait for threads.
    """
    try:
        yield
    except KeyboardInterrupt:
        discard(remove)
        end = time.monotonic() + seconds
        while _removers and time.monotonic() < end:
            time.sleep(0.05)
        raise


def discard(remove: Callable[[Iterable[str]], None], seconds: float = 1.0) -> None:
    """Removes all of it, for a process or a run that ends now; no further file is begun.

    Args:
      remove: removes files that ended worker processes of this machine have left.
      seconds: how long it may take; a remote file system may need longer, and then leaves some.
    """
    _stopped.set()
    work = threading.Thread(target=_discard, args=(remove,), daemon=True)
    work.start()
    work.join(seconds)


def _discard(remove_files: Callable[[Iterable[str]], None]) -> None:
    # Twice, as another thread may be about to make the file that it has just announced.
    for pause in (0.05, 0.0):
        with _lock:
            removers = list(_removers.values())
        for remove in removers:
            with contextlib.suppress(Exception):
                remove()
        for folder in _folders:
            for note in glob.glob(os.path.join(folder, "unfinished-*")):
                with contextlib.suppress(Exception), open(note, encoding="utf-8") as handle:
                    remove_files([handle.read()])
            shutil.rmtree(folder, ignore_errors=True)
        time.sleep(pause)
