"""How far a process is with its work: workers add to it, whoever shows it asks.

    with progress.piece("embedding", size=shard_bytes) as piece:
      piece.add(examples=512, size=batch_bytes)

    with progress.reported(show):     # a line every few seconds, a bar, a page
      ...

Each process knows of its own work only. The launcher's process, which does all of it on a local
runner, is told how much there is (`expect`), and can say how long the rest takes; a worker process
says it of the pieces that it has begun, in its own log.
"""

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

_log = logging.getLogger(__name__)

SECONDS = 8.0  # between two lines


@dataclasses.dataclass(frozen=True)
class Progress:
    """A part of the work, as it stands.

    Attributes:
      part: what is being done, such as "embedding".
      examples: how many are done; an example counts at each checkpoint.
      rate: examples a second, since the part began.
      share: of the part that is done, from 0 to 1; None where it is not known.
      seconds_left: None where it is not known.
    """

    part: str
    examples: int
    rate: float
    share: float | None
    seconds_left: float | None

    def __str__(self) -> str:
        said = f"{self.part}: {self.examples:,} examples, {self.rate:,.0f} a second"
        if self.share is None or self.seconds_left is None:
            return said
        return f"{said}; {self.share:.0%} done, about {spelt_out(self.seconds_left)} left"


def spelt_out(seconds: float) -> str:
    """12 s, 3 min, 2.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Piece:
    """A piece of work under way."""

    def __init__(self, part: "_Part", size: float) -> None:
        self._part = part
        self._left = size

    def add(self, examples: int, size: float) -> None:
        """Says that so many more examples are done, and so much of the piece's size."""
        # What was taken for the size may be less than there is, as in compressed files.
        counted = min(size, self._left)
        self._left -= counted
        self._part.add(examples, counted)

    def finish(self) -> None:
        """Says that nothing is left to do of it."""
        self._part.add(0, self._left)
        self._left = 0


class _Part:
    def __init__(self) -> None:
        self.started = time.monotonic()
        self.lock = threading.Lock()
        self.examples = 0
        self.done = self.begun = 0.0
        self.expected: float | None = None
        self.running = 0

    def add(self, examples: int, size: float) -> None:
        with self.lock:
            self.examples += examples
            self.done += size

    def read(self, name: str) -> Progress:
        seconds = max(time.monotonic() - self.started, 1e-6)
        size = self.expected or self.begun
        share = min(1.0, self.done / size) if size else None
        left = seconds * (1 - share) / share if share else None
        return Progress(name, self.examples, self.examples / seconds, share, left)


_parts: dict[str, _Part] = {}
_reporters: list[threading.Event] = []
_lock = threading.Lock()


def _part(name: str) -> _Part:
    with _lock:
        return _parts.setdefault(name, _Part())


def expect(part: str, size: float) -> None:
    """Says how large all pieces of a part are that this process will work on, together."""
    _part(part).expected = size


def skip(part: str, size: float) -> None:
    """Says that a piece of what is expected is not to be worked on, as it was found done."""
    mine = _part(part)
    with mine.lock:
        if mine.expected:
            mine.expected = max(mine.expected - size, mine.begun)


@contextlib.contextmanager
def piece(part: str, size: float) -> Iterator[Piece]:
    """A piece of a part's work.

    Args:
      part: what is being done.
      size: of the piece, in any unit that `expect` has too.
    """
    mine = _part(part)
    with mine.lock:
        if not mine.begun:
            mine.started = time.monotonic()
        mine.begun += size
        mine.running += 1
    if not _reporters:  # in a worker's process
        _start(_in_the_log)
    whole = Piece(mine, size)
    try:
        yield whole
    finally:
        whole.finish()
        with mine.lock:
            mine.running -= 1


def read() -> list[Progress]:
    """The parts that are being worked on."""
    with _lock:
        running = [(name, part) for name, part in _parts.items() if part.running]
    return [part.read(name) for name, part in running]


@contextlib.contextmanager
def reported(
    show: Callable[[Sequence[Progress], float], None], seconds: float | None = None
) -> Iterator[None]:
    """In this block the progress of a job in this process is shown at intervals; it starts anew.

    Args:
      show: takes what `read` gives, which is empty while something is done that is not counted, and
        the seconds since the start. It is called in a thread of its own.
      seconds: between two calls; a few, if not given.
    """
    with _lock:
        _parts.clear()
    end = _start(show, seconds or SECONDS)
    try:
        yield
    finally:
        end.set()
        _reporters.remove(end)


def _start(
    show: Callable[[Sequence[Progress], float], None], seconds: float = SECONDS
) -> threading.Event:
    end = threading.Event()
    _reporters.append(end)
    started = time.monotonic()

    def tell() -> None:
        while not end.wait(seconds):
            show(read(), time.monotonic() - started)

    threading.Thread(target=tell, name="progress", daemon=True).start()
    return end


def _in_the_log(parts: Sequence[Progress], seconds: float) -> None:
    for part in parts:
        _log.info("%s", part)


def as_lines(parts: Sequence[Progress], seconds: float) -> None:
    """Shows progress in the log, and that there is some where nothing is counted."""
    if parts:
        _in_the_log(parts, seconds)
    else:
        _log.info("at work for %s", spelt_out(seconds))
