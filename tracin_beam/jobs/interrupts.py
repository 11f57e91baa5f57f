"""Ctrl-C and SIGTERM: one line, nothing left half done, and the signal's exit status."""

import contextlib
import glob
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from tracin_beam.storage import files, unfinished

_SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_last_words: list[Callable[[], None]] = []


@contextlib.contextmanager
def handled(prog: str) -> Iterator[None]:
    """In this block the signals end the process with status 130 or 143.

    It does not wait for workers, which would go on until their piece of work is done: what is
    finished is found by the next run, and unfinished files are removed. Outside of the main thread,
    where Python takes no signals, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        for other in _SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        for say in _last_words:
            with contextlib.suppress(Exception):
                say()
        _kill_workers()
        unfinished.discard(files.remove)
        # The stream may be in use by the very code that was interrupted.
        said = f"{prog}: stopped by {_SIGNALS[signal.Signals(number)]}; the same command goes on.\n"
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os.write(2, said.encode())
        os._exit(128 + number)

    earlier = {number: signal.signal(number, leave) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _kill_workers() -> None:
    """Ends the processes that this one has started, and theirs in turn, where /proc lists them."""
    children: dict[int, list[int]] = {}
    for stat in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError), open(stat) as handle:
            # The process's name, which comes before its parent in brackets, may hold anything.
            parent = int(handle.read().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.split("/")[2]))
    found = [os.getpid()]
    for parent in found:
        found += children.get(parent, [])
    for child in found[1:]:
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGKILL)


@contextlib.contextmanager
def telling(tell: Callable[[], None]) -> Iterator[None]:
    """In this block `tell` is called before the process ends by a signal; it must be quick."""
    _last_words.append(tell)
    try:
        yield
    finally:
        _last_words.remove(tell)
