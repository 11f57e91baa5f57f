"""A Keras callback that saves the checkpoints TracIn needs."""

import os
import tempfile
import warnings
from collections.abc import Mapping
from typing import Any

import keras

from tracin_beam.errors import InputError
from tracin_beam.inputs.checkpoints import LISTING, read_entries
from tracin_beam.storage import files


class TracInCheckpoint(keras.callbacks.Callback):
    """Saves the model's weights as it trains, with the learning rate that the last step used.

    Writes `<directory>/<step>.weights.h5`, where `step` is the optimizer's step count in eight
    digits, and then lists it in `<directory>/checkpoints.json`. Both appear whole or not at all, so
    the directory can be read at any moment, whenever the training may have been killed. Keras can
    resume from the weights, which hold the optimizer's state.

    When training begins anew the list begins anew, with a warning if there was one. When it
    resumes, which shows in the optimizer's step count, the entries up to that step stay.

    Args:
        directory: a path on any file system that Beam knows.
        save_freq: "epoch" to save after each epoch; or a number of batches, and then the final step
            is saved as well. As `keras.callbacks.ModelCheckpoint`, it counts on over epochs, and
            with `steps_per_execution` looks only after each execution.
    """

    def __init__(self, directory: str | os.PathLike[str], save_freq: str | int = "epoch"):
        super().__init__()
        whole = isinstance(save_freq, int) and not isinstance(save_freq, bool) and save_freq > 0
        if not (save_freq == "epoch" or whole):
            raise InputError(f"save_freq must be 'epoch' or a number of batches, not {save_freq!r}")
        self.directory = os.fspath(directory)
        self.save_freq = save_freq
        self._listing = files.join(self.directory, LISTING)
        self._entries: list[dict[str, Any]] | None = None
        self._learning_rate: float | None = None  # of the last step, None before it
        self._epoch = 0
        self._batch = -1
        self._unsaved_batches = 0

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        self._entries, self._learning_rate, self._unsaved_batches = None, None, 0

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._epoch, self._batch = epoch, -1
        if self._entries is None:  # only now have other callbacks restored what they restore
            self._entries = self._kept_entries()

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        # Read here: by the end of the epoch other callbacks may have set the next epoch's.
        self._learning_rate = _last_learning_rate(self.model.optimizer)
        self._unsaved_batches += batch - self._batch
        self._batch = batch
        if self.save_freq != "epoch" and self._unsaved_batches >= int(self.save_freq):
            self._save()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        if self.save_freq == "epoch":
            self._save()

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        if self.save_freq != "epoch" and self._unsaved_batches:
            self._save()

    def _step(self) -> int:
        return int(self.model.optimizer.iterations)

    def _kept_entries(self) -> list[dict[str, Any]]:
        if not files.exists(self._listing):
            return []
        entries = read_entries(self.directory)
        step = self._step()
        kept = [entry for entry in entries if step and entry["step"] <= step]
        if entries and not step:
            warnings.warn(
                f"{self._listing} listed {len(entries)} checkpoints of another training run. This "
                "one begins at step 0, so the list begins anew",
                stacklevel=2,
            )
        if kept != entries:  # before their files are overwritten
            files.write_json(self._listing, kept)
        return kept

    def _save(self) -> None:
        if self._learning_rate is None or self._entries is None:  # no step was taken
            return
        step = self._step()
        name = f"{step:08d}.weights.h5"
        with tempfile.TemporaryDirectory() as folder:
            local = os.path.join(folder, name)
            self.model.save_weights(local)
            files.upload(local, files.join(self.directory, name))
        entry = {
            "path": name,
            "step": step,
            "epoch": self._epoch + 1,
            "learning_rate": self._learning_rate,
        }
        self._entries = [entry for entry in self._entries if entry["step"] < step] + [entry]
        files.write_json(self._listing, self._entries)
        self._unsaved_batches = 0


def _last_learning_rate(optimizer: keras.optimizers.Optimizer) -> float:
    """The learning rate that the last update of the weights used."""
    while isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    # The public property is a schedule's value at the next step.
    rate = getattr(optimizer, "_learning_rate", None)
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        # Schedules count every batch, iterations only the groups whose gradients were accumulated.
        every = optimizer.gradient_accumulation_steps or 1
        rate = rate(max(int(optimizer.iterations) * every - 1, 0))
    else:
        rate = optimizer.learning_rate
    return float(keras.ops.convert_to_numpy(rate))
