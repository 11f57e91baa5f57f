"""Counters and timers of the stages' DoFns, in Beam's metrics.

Beam counts only what is said in the thread that runs a bundle, and only by counters that were made
with the DoFn. Work that other threads do is therefore added up in a `Tally`, which the DoFn hands
over at the end.
"""

import collections
import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from apache_beam.metrics import Metrics
from apache_beam.runners.runner import PipelineResult

# Namespaces of ours; others are Beam's and the user's.
_STAGES = ("embed", "index", "search", "rescore", "total", "retrieval", "self_influence")
_log = logging.getLogger(__name__)

T = TypeVar("T")


class Tally:
    """Numbers and seconds of a piece of work, which any thread may add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[str, float] = collections.defaultdict(float)

    def add(self, name: str, amount: float = 1) -> None:
        with self._lock:
            self._found[name] += amount

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the seconds within it to the part `name`, as milliseconds `<name>_msec`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(f"{name}_msec", 1000 * (time.perf_counter() - started))

    def read(self) -> dict[str, int]:
        with self._lock:
            return {name: round(amount) for name, amount in self._found.items()}


def timed(items: Iterable[T], tally: Tally, part: str) -> Iterator[T]:
    """The items; the seconds of making them go to a part of the tally."""
    making, end = iter(items), object()
    while True:
        with tally.timed(part):
            item: Any = next(making, end)
        if item is end:
            return
        yield item


class Counters:
    """The counters of a DoFn; made in its `__init__`.

    Attributes:
      stage: their namespace.
    """

    def __init__(self, stage: str, *names: str) -> None:
        self.stage = stage
        self._counters = {name: Metrics.counter(stage, name) for name in names}

    def take(self, tally: Tally) -> None:
        """Counts what a tally has; in the thread that runs the bundle."""
        for name, amount in tally.read().items():
            self._counters[name].inc(amount)


def of_job(result: PipelineResult) -> dict[str, dict[str, int]]:
    """The counters of a job that has ended, by stage; empty on a runner that does not tell."""
    try:
        found: Mapping[str, Any] = result.metrics().query()
    except Exception as error:  # whatever a runner's service raises; the job itself is done
        _log.warning("the runner does not tell what its workers counted: %s", error)
        return {}
    by_stage: dict[str, dict[str, int]] = {}
    for metric in found.get("counters", ()):
        namespace, name = metric.key.metric.namespace, metric.key.metric.name
        amount = metric.committed if metric.committed is not None else metric.attempted
        if namespace in _STAGES and amount is not None:
            counts = by_stage.setdefault(namespace, {})
            counts[name] = counts.get(name, 0) + amount
    return {stage: dict(sorted(counts.items())) for stage, counts in sorted(by_stage.items())}
