"""The task and its engine, once for each worker process and shared by its threads."""

import dataclasses
import threading
from collections.abc import Sequence

from tracin_beam.gradients.batches import Batch, BatchParser
from tracin_beam.gradients.engine import Engine, EngineConfig
from tracin_beam.inputs.task import Task, TaskSource


@dataclasses.dataclass(frozen=True)
class EngineSource:
    """What a worker needs to make an engine; small, as it travels in the pipeline's graph.

    Attributes:
      task: the task's sources.
      config: what to compute.
      sample: a serialised record that parses, to build the model with.
    """

    task: TaskSource
    config: EngineConfig
    sample: bytes

    def get(self) -> "Loaded":
        """This process's engine."""
        with _lock:
            if self not in _loaded:
                task = self.task.load()
                adopt(self, load(task, BatchParser(task), self.config, self.sample))
            return _loaded[self]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A task, ready to be used."""

    task: Task
    parser: BatchParser
    engine: Engine

    def parse(self, records: Sequence[bytes]) -> Batch:
        return self.parser(records)


def load(task: Task, parser: BatchParser, config: EngineConfig, sample: bytes) -> Loaded:
    """Builds the engine, with the features of a serialised record that parses."""
    return Loaded(task, parser, Engine(task, config, parser, parser([sample])))


def adopt(source: EngineSource, loaded: Loaded) -> None:
    """Makes an engine this process's; that of an earlier job in the process is let go."""
    with _lock:
        _loaded.clear()
        _loaded[source] = loaded


_loaded: dict[EngineSource, Loaded] = {}
_lock = threading.RLock()
