"""Which examples each step of a training used, as `TracInCheckpoint(record_batches=True)` saves it.

    <directory>/batches/start.weights.h5    the weights before the first step
    <directory>/batches/<step>.parquet      the steps since the checkpoint before, up to this one:
                                            step, learning_rate, examples

An example is known by a digest of what the model was given of it, features and label. So the record
needs no ids, and an example that was augmented is not taken for the one that it was made from.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import tensorflow as tf

from tracin_beam.errors import InputError
from tracin_beam.inputs.checkpoints import WEIGHTS, Checkpoint, read_checkpoints
from tracin_beam.storage import files, tables

_FOLDER = "batches"
_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("learning_rate", pa.float64()),
        ("examples", pa.list_(pa.binary(16))),
    ]
)


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A step of a training.

    Attributes:
      step: its number, from 1.
      learning_rate: that it used.
      examples: digests of its batch, as `digests` gives them.
    """

    step: int
    learning_rate: float
    examples: tuple[bytes, ...]


def digests(features: Any, label: Any) -> list[bytes]:
    """16 bytes for each example of a batch, of its features and label.

    Args:
      features, label: structures of tensors or arrays [B, …]; leaves that are None are left out.
        Numbers are compared as float32 and int64, in which Keras trains.
    """
    leaves = [_plain(x) for x in tf.nest.flatten((features, label)) if x is not None]
    size = len(leaves[0])
    rows = [hashlib.blake2b(digest_size=16) for _ in range(size)]
    for leaf in leaves:
        for row, value in zip(rows, leaf, strict=True):
            content = repr(value.tolist()).encode() if value.dtype == object else value.tobytes()
            row.update(f"{value.size}:".encode() + content)
    return [row.digest() for row in rows]


def _plain(x: Any) -> np.ndarray:
    if isinstance(x, tf.RaggedTensor):
        x = x.to_tensor()
    elif isinstance(x, tf.SparseTensor):
        x = tf.sparse.to_dense(x)
    values = np.asarray(x)
    if values.dtype.kind in "biu":
        values = values.astype(np.int64)
    elif values.dtype.kind not in "OSU":
        values = values.astype(np.float32)
    else:
        values = values.astype(object)
    # A label [B, 1] is the label [B] that Keras makes it of.
    return np.ascontiguousarray(values.reshape(len(values), -1))


class Recorder:
    """Takes a step at a time through a model's train function, and remembers its batch.

    Args:
      model: a compiled model, in `fit`.
      learning_rate: the rate of the step that was just taken.
    """

    def __init__(self, model: Any, learning_rate: Callable[[], float]) -> None:
        strategy = getattr(model, "distribute_strategy", None)
        if strategy is not None and strategy.num_replicas_in_sync > 1:
            raise InputError(
                "record_batches=True takes one replica: leave the distribution strategy out"
            )
        self._model = model
        self._original = model.train_function
        self._learning_rate = learning_rate
        self._taken: list[tuple[float, list[bytes]]] = []
        model.train_function = self._step

    def stop(self) -> None:
        """Gives the model its own train function back."""
        if self._model.train_function == self._step:
            self._model.train_function = self._original

    def _step(self, iterator: Iterable[Any]) -> Any:
        batches = list(itertools.islice(iterator, self._model.steps_per_execution))
        if not batches:
            raise StopIteration
        for batch in batches:
            features, label, *_ = batch if isinstance(batch, tuple) else (batch, None)
            logs = self._original(iter([batch]))
            self._taken.append((self._learning_rate(), digests(features, label)))
        return logs

    def write(self, directory: str, last: int) -> None:
        """Writes the steps that were taken since the last call, of which this is the last one."""
        if self._taken:
            first = last - len(self._taken) + 1
            rows = [
                {"step": first + i, "learning_rate": rate, "examples": found}
                for i, (rate, found) in enumerate(self._taken)
            ]
            path = files.join(directory, _FOLDER, f"{last:08d}.parquet")
            tables.write(path, pa.Table.from_pylist(rows, schema=_SCHEMA))
        self._taken = []


def start_of(directory: str) -> str:
    """The path of the weights in which a recorded training began."""
    return files.join(directory, _FOLDER, f"start{WEIGHTS}")


def read(directory: str) -> list[Recorded]:
    """The steps up to the last checkpoint that a directory lists, in order.

    Raises:
      InputError: some step is not recorded.
    """
    checkpoints = read_checkpoints(directory)
    steps = list(_steps(directory, checkpoints))
    missing = set(range(1, checkpoints[-1].step + 1)) - {s.step for s in steps}
    if missing:
        raise InputError(
            f"{directory} does not record which examples step {min(missing)} used: train with "
            "TracInCheckpoint(…, record_batches=True) from the first step on"
        )
    return steps


def _steps(directory: str, checkpoints: Sequence[Checkpoint]) -> Iterator[Recorded]:
    for checkpoint in checkpoints:
        path = files.join(directory, _FOLDER, f"{checkpoint.step:08d}.parquet")
        if files.exists(path):
            for row in tables.read(path).to_pylist():
                yield Recorded(row["step"], row["learning_rate"], tuple(row["examples"]))


def places(steps: Sequence[Recorded], features: Any, label: Any) -> list[tuple[int, ...]]:
    """For each step, where in a training set the examples of its batch stand.

    Of examples that are equal the first stands for all.

    Raises:
      InputError: a step used an example that is none of these.
    """
    known: dict[bytes, int] = {}
    for place, digest in enumerate(digests(features, label)):
        known.setdefault(digest, place)
    found = []
    for step in steps:
        if unknown := [i for i, digest in enumerate(step.examples) if digest not in known]:
            raise InputError(
                f"Step {step.step} used an example (the one at place {unknown[0]} of its batch) "
                "that is not among the training examples given: they are others, or the training "
                "changed them on the way, as augmentation does"
            )
        found.append(tuple(known[digest] for digest in step.examples))
    return found
