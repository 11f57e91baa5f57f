"""Saving the checkpoints TracIn needs: a Keras callback, and a function for other loops."""

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from tracin_beam.errors import InputError
from tracin_beam.inputs import batches, moments, state, trained, weights
from tracin_beam.inputs.checkpoints import (
    LISTING,
    WEIGHTS,
    checked_rate,
    first_ten,
    read_entries,
    read_notes,
)
from tracin_beam.storage import files

# Numbers that are looked at after each step, to see whether the weights have changed since.
_SAMPLED = 1 << 16


def save_checkpoint(
    directory: str | os.PathLike[str],
    model: keras.Model,
    step: int,
    learning_rate: float,
    epoch: int | None = None,
    train: trained.Shards | None = None,
    optimizer: keras.optimizers.Optimizer | None = None,
) -> str:
    """Saves a model's weights as the next checkpoint of a training loop of one's own.

    Writes `<directory>/<step>.weights.h5` and then lists it in `<directory>/checkpoints.json`, as
    `TracInCheckpoint` does. Both appear whole or not at all. No file is ever overwritten.

    Example:

        >>> import keras, tracin_beam
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> for step in range(1, 2001):  # in each of which the model is trained on a batch
        ...     if step % 1000 == 0:
        ...         path = tracin_beam.save_checkpoint("own", model, step, learning_rate=0.1)
        >>> path
        'own/00002000.weights.h5'

    Args:
      directory: a path on any file system that Beam knows.
      model: a built model. `UserWarning` if a file of its weights leaves some out.
      step: how many steps have been taken, over all stages of the training.
      learning_rate: of the last step; a number, or a scalar tensor or variable.
      epoch: how many epochs have been, if that is to be listed.
      train: the shards that it was trained on since the checkpoint before, as of
        `TracInCheckpoint`.
      optimizer: whose second moments are kept beside the weights, as of `optimizer_state`; none
        by default.

    Returns:
      The path of the weights.

    Raises:
      InputError: the directory lists this step or a later one, the learning rate is no finite
        number of at least 0, or there are no such shards.
    """
    if isinstance(step, bool) or int(step) != step or step < 0:
        raise InputError(f"step must be a whole number of at least 0, not {step!r}")
    if callable(learning_rate) and not hasattr(learning_rate, "shape"):
        raise InputError("learning_rate is a schedule: give its value at the last step")
    rate = checked_rate(_number(learning_rate), "save_checkpoint")
    entries = _entries(os.fspath(directory))
    if entries and entries[-1]["step"] >= step:
        raise InputError(
            f"{files.join(os.fspath(directory), LISTING)} already lists step "
            f"{entries[-1]['step']}, so step {step} cannot follow: count on from there, or choose "
            "another directory"
        )
    shards = trained.described(train)
    folder = os.fspath(directory)
    return _write(folder, entries, model, int(step), rate, epoch, None, shards, optimizer)


def _number(value: Any) -> float:
    return float(weights.array(value))


def _entries(directory: str) -> list[dict[str, Any]]:
    return read_entries(directory) if files.exists(files.join(directory, LISTING)) else []


def _write(
    directory: str,
    entries: list[dict[str, Any]],
    model: keras.Model,
    step: int,
    learning_rate: float,
    epoch: int | None,
    iterations: int | None,
    shards: list[dict[str, str]] | None,
    optimizer: keras.optimizers.Optimizer | None,
) -> str:
    """Saves the weights and appends an entry to `entries`, in place and in the listing.

    The second moments of an optimizer are saved too, if it is given.
    """
    if lost := weights.unsaved(model):
        warnings.warn(
            f"The checkpoint of step {step} is not enough to compute with. "
            + weights.unsaved_reason(lost),
            stacklevel=3,
        )
    names = [f"{step:08d}{WEIGHTS}", *(f"{step:08d}-{n}{WEIGHTS}" for n in range(2, 1000))]
    name = next(n for n in names if not files.exists(files.join(directory, n)))
    path = files.join(directory, name)
    notes = {
        "step": step,
        "learning_rate": learning_rate,
        "iterations": iterations,
        "weights": weights.digest(model),
        "state": state.adapted(model),
    }
    weights.save(model, path, notes)
    if optimizer is not None:
        moments.save(model, optimizer, path)
    entry = {"path": name, "step": step, "epoch": epoch, "learning_rate": learning_rate}
    trained.note(entry, entries, shards)
    entries.append(entry)
    files.write_json(files.join(directory, LISTING), entries)
    return path


class TracInCheckpoint(keras.callbacks.Callback):
    """Saves the model's weights as it trains, with the learning rate that the last step used.

    Writes `<directory>/<step>.weights.h5`, where `step` in eight digits is how many steps the
    optimizer has taken, and then lists it in `<directory>/checkpoints.json`. Both appear whole or
    not at all, so the directory can be read at any moment, whenever the training may have been
    killed. Keras can resume from the weights, which hold the optimizer's state.

    A training that begins with the weights of a listed checkpoint goes on from it: resumed, or
    another stage that was compiled anew. The steps count on, and later entries of the list, which
    belong to a training that was given up, are left out of it. No file is ever overwritten.

    Put it first in the list of callbacks, before any that swaps averaged weights in.

    Example:

        >>> import keras, numpy as np, tracin_beam
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile(keras.optimizers.SGD(0.1), "mse")
        >>> saving = tracin_beam.TracInCheckpoint("ckpts")
        >>> x, y = np.zeros((8, 4)), np.zeros((8, 1))
        >>> _ = model.fit(x, y, epochs=2, batch_size=4, verbose=0, callbacks=[saving])
        >>> import os
        >>> sorted(os.listdir("ckpts"))
        ['00000002.weights.h5', '00000004.weights.h5', 'checkpoints.json']

    Args:
      directory: a path on any file system that Beam knows.
      save_freq: "epoch" to save after each epoch; or a number of batches, and then the final step
        is saved as well. As `keras.callbacks.ModelCheckpoint`, it counts on over epochs, and
        with `steps_per_execution` looks only after each execution.
      optimizer: the one that trains the weights that count, if not `model.optimizer`, as in a
        `train_step` of one's own.
      learning_rate: to be listed instead of the optimizer's: a number, or a function of how many
        steps were taken before, as a `LearningRateSchedule`. Needed where no Keras optimizer
        counts steps: then batches are counted.
      record_batches: whether to save which examples each step used, with its learning rate, and
        the weights before the first one, for `scoring.replay`. It costs a digest of every example
        of every batch, and takes steps one by one.
      optimizer_state: whether to keep the second moments of Adam, AdamW, Nadam, Adamax or RMSprop
        beside the weights, in `<directory>/optimizer/`, for `--gradient adam`.
      train: the shards that are trained on: a glob as of `--train`, or a list of paths. They are
        listed with size and checksum, so that the job `quality` can tell examples that the model
        has seen from new ones.

    Raises:
      InputError: from `fit`: the directory holds the checkpoints of another training, the
        optimizer is not the one that trains, another callback has changed the weights
        before they could be saved, or there are no such shards.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        save_freq: str | int = "epoch",
        *,
        optimizer: keras.optimizers.Optimizer | None = None,
        learning_rate: float | Callable[[int], Any] | None = None,
        record_batches: bool = False,
        train: trained.Shards | None = None,
        optimizer_state: bool = False,
    ):
        super().__init__()
        whole = isinstance(save_freq, int) and not isinstance(save_freq, bool) and save_freq > 0
        if not (save_freq == "epoch" or whole):
            raise InputError(f"save_freq must be 'epoch' or a number of batches, not {save_freq!r}")
        if not isinstance(optimizer, keras.optimizers.Optimizer | None):
            raise InputError(f"optimizer must be a Keras optimizer, not {optimizer!r}")
        if learning_rate is not None and not callable(learning_rate):
            checked_rate(learning_rate, "TracInCheckpoint")
        self.directory = os.fspath(directory)
        self.save_freq = save_freq
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.record_batches = record_batches
        self.train = train
        self.optimizer_state = optimizer_state
        self._recorder: batches.Recorder | None = None
        self._listing = files.join(self.directory, LISTING)
        self._entries: list[dict[str, Any]] | None = None
        self._stepped = False

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        self._entries = None

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._epoch, self._batch = epoch, -1
        if self._entries is None:  # only now have other callbacks restored what they restore
            self._begin()

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._batches += batch - self._batch
        self._unsaved_batches += batch - self._batch
        self._batch = batch
        self._trained = self._sample()
        self._stepped = self._stepped or self._count() != self._first_count
        if not self._stepped and self.learning_rate is None and self._changed(self._first):
            raise InputError(self._not_the_optimizer())
        # Read here: by the end of the epoch other callbacks may have set the next epoch's.
        self._rate = self._last_rate()
        if self.save_freq != "epoch" and self._unsaved_batches >= int(self.save_freq):
            self._save()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        if self.save_freq == "epoch":
            self._save(first_may_fail=True)

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        if self.save_freq != "epoch" and self._entries is not None and self._unsaved_batches:
            self._save()
        if self._recorder:
            self._recorder.stop()

    def _begin(self) -> None:
        many = getattr(keras.optimizers, "MultiOptimizer", ())  # not in older Keras
        if self.learning_rate is None and isinstance(self._optimizer(), many):
            raise InputError(
                "A MultiOptimizer has many learning rates: give TracInCheckpoint the one that "
                "counts, by optimizer= or learning_rate="
            )
        if self.optimizer_state:
            moments.check(self._optimizer())
        self._batches = self._unsaved_batches = 0
        self._first_count, self._first = self._count(), self._sample()
        self._stepped, self._saved, self._trained = False, False, self._first
        self._shards = trained.described(self.train)
        self._entries, self._first_step = self._history()
        if self.record_batches:
            if not self._entries:
                weights.save(self.model, batches.start_of(self.directory), {})
            self._recorder = batches.Recorder(self.model, self._last_rate)

    def _optimizer(self) -> keras.optimizers.Optimizer | None:
        return self.optimizer or getattr(self.model, "optimizer", None)

    def _count(self) -> int:
        optimizer = self._optimizer()
        return int(weights.array(optimizer.iterations)) if optimizer is not None else 0

    def _last_rate(self) -> float:
        if callable(self.learning_rate):
            stepped = self._stepped or self._count() != self._first_count
            taken = self._count() if stepped else self._batches
            return _number(self.learning_rate(max(taken - 1, 0)))
        if self.learning_rate is not None:
            return float(self.learning_rate)
        optimizer = self._optimizer()
        return _last_learning_rate(optimizer) if optimizer is not None else 0.0

    def _sample(self) -> list[np.ndarray]:
        """The smallest trainable weights."""
        found: list[np.ndarray] = []
        numbers = 0
        for variable in sorted(self.model.trainable_variables, key=lambda v: np.prod(v.shape)):
            numbers += int(np.prod(variable.shape))
            if found and (len(found) == 3 or numbers > _SAMPLED):
                break
            found.append(np.array(weights.array(variable), np.float64))
        return found

    def _changed(self, others: list[np.ndarray], tolerance: float = 0.0) -> bool:
        """Whether the weights after the last step differ from these others."""
        return any(
            np.abs(a - b).max(initial=0) > tolerance * np.abs(a).max(initial=0)
            for a, b in zip(self._trained, others, strict=True)
        )

    def _history(self) -> tuple[list[dict[str, Any]], int]:
        """The entries that this training goes on from, and how many steps came before it."""
        entries, count = _entries(self.directory), self._first_count
        if not entries:
            return [], count
        present = weights.digest(self.model)
        for number in reversed(range(len(entries))):
            path = files.join(self.directory, entries[number]["path"])
            notes = read_notes(path) if files.exists(path) else {}
            if notes.get("weights") == present:
                kept, step = entries[: number + 1], entries[number]["step"]
                break
            if number == len(entries) - 1:
                before = notes.get("iterations")
                offset = entries[-1]["step"] - before if isinstance(before, int) else 0
        else:
            step = offset + count
            kept = [entry for entry in entries if entry["step"] <= step]
            if not (count and kept):
                raise InputError(
                    f"{self._listing} lists {len(entries)} checkpoints, and the model that begins "
                    "to train has the weights of none of them: choose another directory, remove "
                    "what is in this one, or load the weights of the one to go on from"
                )
        if left := [str(entry["step"]) for entry in entries if entry not in kept]:
            warnings.warn(
                f"The training goes on from step {step}, so {self._listing} will no longer list "
                f"what came after it: step {first_ten(left)}. The files stay",
                stacklevel=2,
            )
        return kept, step

    def _save(self, first_may_fail: bool = False) -> None:
        assert self._entries is not None
        count = self._count()
        if not self._stepped and not self._changed(self._first):  # no step was taken
            return
        taken = count - self._first_count if self._stepped else self._batches
        step = self._first_step + taken
        if self._entries and self._entries[-1]["step"] >= step:
            return
        # Swapping weights to and fro, as around a validation, may leave errors of rounding.
        if self._changed(self._sample(), 1e-5):
            message = (
                f"Another callback has changed the weights after step {step}, so they are not "
                "those that were trained: put TracInCheckpoint before callbacks that swap averaged "
                "or restored weights in, and after those that change the weights with each step"
            )
            if first_may_fail and not self._saved:
                raise InputError(message)
            warnings.warn(message + ". This checkpoint is not saved", stacklevel=2)
            return
        rate = checked_rate(self._rate, "TracInCheckpoint")
        if self._recorder:
            if not self._stepped:
                raise InputError("record_batches=True needs a Keras optimizer that counts steps")
            self._recorder.write(self.directory, step)
        _write(
            self.directory,
            self._entries,
            self.model,
            step,
            rate,
            self._epoch + 1,
            count if self._stepped else None,
            self._shards,
            self._optimizer() if self.optimizer_state else None,
        )
        self._saved, self._unsaved_batches = True, 0

    def _not_the_optimizer(self) -> str:
        optimizer = self._optimizer()
        others = [
            f"{name} ({type(value).__name__})"
            for name, value in vars(self.model).items()
            if isinstance(value, keras.optimizers.Optimizer)
            and value is not optimizer
            and int(weights.array(value.iterations))
        ]
        which = "The optimizer given" if self.optimizer is not None else "model.optimizer"
        return (
            f"{which} ({type(optimizer).__name__}) has taken no step, though the weights have "
            "changed: it is not the one that trains them. Give TracInCheckpoint optimizer= or "
            "learning_rate=" + (f"; the model also has {', '.join(others)}" if others else "")
        )


def _last_learning_rate(optimizer: keras.optimizers.Optimizer) -> float:
    """The learning rate that the last update of the weights used."""
    while isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    # The public property is a schedule's value at the next step.
    rate = getattr(optimizer, "_learning_rate", None)
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        # Schedules count every batch, iterations only the groups whose gradients were accumulated.
        every = optimizer.gradient_accumulation_steps or 1
        rate = rate(max(int(weights.array(optimizer.iterations)) * every - 1, 0))
    else:
        rate = optimizer.learning_rate
    return _number(rate)
