"""What a process must not leave behind: unfinished files and its temporary folder."""

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

_lock = threading.Lock()
_removers: dict[str, Callable[[], None]] = {}
_stopped = threading.Event()
_folders: list[str] = []


@contextlib.contextmanager
def file(path: str, remove: Callable[[], None]) -> Iterator[None]:
    """Within it there is an unfinished file at `path`, which `remove` removes."""
    with _lock:
        _removers[path] = remove
    try:
        if _stopped.is_set():
            raise InterruptedError(f"{path}: this process is about to end")
        yield
    finally:
        with _lock:
            _removers.pop(path, None)


@contextlib.contextmanager
def temporary_folder() -> Iterator[None]:
    """Within it temporary files, of other packages and child processes too, lie in one folder.

    The folder is private to the user, and is removed with all that is in it.

    Raises:
      OSError: there is no place for it.
    """
    earlier = tempfile.tempdir, os.environ.get("TMPDIR")
    folder = tempfile.mkdtemp(prefix="tracin-")
    _folders.append(folder)
    tempfile.tempdir = os.environ["TMPDIR"] = folder
    try:
        yield
    finally:
        tempfile.tempdir = earlier[0]
        os.environ.pop("TMPDIR")
        if earlier[1] is not None:
            os.environ["TMPDIR"] = earlier[1]
        _folders.remove(folder)
        shutil.rmtree(folder, ignore_errors=True)


def discard(seconds: float = 1.0) -> None:
    """Removes all of it, for a process that ends now; no further file is begun.

    Args:
      seconds: how long it may take; a remote file system may need longer, and then leaves some.
    """
    _stopped.set()
    work = threading.Thread(target=_discard, daemon=True)
    work.start()
    work.join(seconds)


def _discard() -> None:
    # Twice, as another thread may be about to make what it has said it would.
    for pause in (0.05, 0.0):
        with _lock:
            removers = list(_removers.values())
        for remove in removers:
            with contextlib.suppress(Exception):
                remove()
        for folder in _folders:
            shutil.rmtree(folder, ignore_errors=True)
        time.sleep(pause)
