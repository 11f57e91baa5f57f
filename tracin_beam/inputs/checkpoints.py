"""The checkpoints of a training run: which there are, and their weights."""

import contextlib
import inspect
import itertools
import math
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from tracin_beam.errors import InputError
from tracin_beam.storage import files, patterns

if TYPE_CHECKING:
    import h5py

LISTING = "checkpoints.json"
WEIGHTS = ".weights.h5"
MODEL = ".keras"


@dataclass(frozen=True)
class Checkpoint:
    """The weights after `step` optimizer steps, and the learning rate of the last one."""

    path: str
    step: int
    epoch: int | None
    learning_rate: float


def read_checkpoints(
    spec: str, learning_rate: Sequence[float] | float | None = None
) -> list[Checkpoint]:
    """Finds the checkpoints of a training run, in training order.

    Args:
        spec: a directory that `TracInCheckpoint` wrote; or a glob, or a comma separated list, of
            the `.weights.h5` or `.keras` files that Keras's `ModelCheckpoint` writes. Such files
            are put in the order of their optimizer's step counts if all hold one, else of their
            names with numbers taken as numbers; then `step` is the first number in their base names
            if that rises strictly, else 1, 2, ...
        learning_rate: one for all checkpoints, or one for each in training order. Needed for
            `.weights.h5` files; `.keras` files know theirs, unless its schedule is not Keras's own.

    Raises:
        InputError: there is no checkpoint, one cannot be read, its learning rate is not known or
            not a number of at least 0, or two have the same step.
    """
    if files.exists(listing := files.join(spec, LISTING)):
        checkpoints = _read_listing(spec, listing, learning_rate)
    elif spec.endswith((WEIGHTS, MODEL)) or re.search(r"[*?\[,]", spec):
        checkpoints = _read_files(spec, learning_rate)
    else:
        raise InputError(
            f"There is no {LISTING} in {spec!r}: give a directory that TracInCheckpoint wrote, or "
            f"a glob of {WEIGHTS} or {MODEL} files, such as '{files.join(spec, '*' + WEIGHTS)}'"
        )
    for earlier, later in itertools.pairwise(checkpoints):
        if earlier.step >= later.step:
            relation = (
                "have the same step" if earlier.step == later.step else "are not in training order"
            )
            raise InputError(
                f"{earlier.path} (step {earlier.step}) and {later.path} (step {later.step}) "
                f"{relation}: leave one out, or put them right"
            )
    return checkpoints


def _read_listing(
    directory: str, listing: str, learning_rate: Sequence[float] | float | None
) -> list[Checkpoint]:
    entries = read_entries(directory)
    if not entries:
        raise InputError(f"{listing} lists no checkpoint: the training run has not saved one yet")
    known = [i for i, entry in enumerate(entries) if entry.get("learning_rate") is not None]
    if known and learning_rate is not None:
        raise InputError(
            f"Entry {known[0]} of {listing} already has a learning rate: leave --learning_rate "
            "out, or take the learning rates out of the file"
        )
    rates = _given_rates(learning_rate, len(entries))
    checkpoints = []
    for i, (entry, given) in enumerate(zip(entries, rates, strict=True)):
        path = files.join(directory, entry["path"])
        if not files.exists(path):
            raise InputError(
                f"{path} is missing, but entry {i} of {listing} names it: bring it back, or "
                "delete the entry"
            )
        rate = given if given is not None else entry.get("learning_rate")
        rate = _checked_rate(rate, f"entry {i} of {listing}")
        checkpoints.append(Checkpoint(path, entry["step"], entry.get("epoch"), rate))
    return checkpoints


def read_entries(directory: str) -> list[dict[str, Any]]:
    """The entries of a directory's checkpoints.json, each checked for its keys' types.

    Raises:
        InputError: naming the entry and the key that is missing or wrong.
    """
    listing = files.join(directory, LISTING)
    entries = files.read_json(listing)
    if not isinstance(entries, list):
        raise InputError(
            f"{listing} must be a list of checkpoints, but is a {type(entries).__name__}"
        )
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise InputError(f"Entry {i} of {listing} must be an object, not {entry!r}")
        for key, kind in (("path", str), ("step", int)):
            if not isinstance(entry.get(key), kind) or isinstance(entry[key], bool):
                what = f"{key!r} is {entry[key]!r}" if key in entry else f"{key!r} is missing"
                raise InputError(
                    f"Entry {i} of {listing}: {what}, it must be of type {kind.__name__}"
                )
        if not isinstance(entry.get("epoch"), int | None):
            raise InputError(
                f"Entry {i} of {listing}: 'epoch' is {entry['epoch']!r}, it must be an int"
            )
    return entries


def _given_rates(
    learning_rate: Sequence[float] | float | None, count: int
) -> Sequence[float | None]:
    if learning_rate is None or isinstance(learning_rate, int | float):
        return [learning_rate] * count
    if len(learning_rate) == 1:
        return [learning_rate[0]] * count
    if len(learning_rate) != count:
        raise InputError(
            f"--learning_rate has {len(learning_rate)} values for {count} checkpoints: give one "
            "for all, or one for each"
        )
    return learning_rate


def _checked_rate(rate: Any, where: str) -> float:
    if rate is None:
        raise InputError(f"No learning rate is known for {where}: give it with --learning_rate")
    if not isinstance(rate, int | float) or isinstance(rate, bool):
        raise InputError(f"The learning rate of {where} must be a number, not {rate!r}")
    if not (math.isfinite(rate) and rate >= 0):
        raise InputError(
            f"The learning rate of {where} is {rate}: it must be finite and at least 0"
        )
    return float(rate)


def _read_files(spec: str, learning_rate: Sequence[float] | float | None) -> list[Checkpoint]:
    paths = [info.path for info in patterns.match(spec)]
    for path in paths:
        check_suffix(path)
    steps: dict[str, int | None] = {path: _iterations(path) for path in paths}
    counted = {path: step for path, step in steps.items() if step is not None}
    # They are all 0 where the optimizer was not what trained the model.
    if len(counted) == len(paths) and any(counted.values()):
        paths.sort(key=lambda path: counted[path])
    else:
        paths.sort(key=_natural_key)
        counted = dict(zip(paths, _steps_in_names(paths) or itertools.count(1), strict=False))
    rates = _given_rates(learning_rate, len(paths))
    checkpoints = []
    for path, given in zip(paths, rates, strict=True):
        rate = given if given is not None else _stored_rate(path, steps[path])
        checkpoints.append(Checkpoint(path, counted[path], None, _checked_rate(rate, path)))
    return checkpoints


def check_suffix(path: str) -> None:
    if not path.endswith((WEIGHTS, MODEL)):
        raise InputError(
            f"{path} is not a checkpoint that can be read: its name must end in {WEIGHTS} or "
            f"{MODEL}. Save others again with model.save_weights"
        )


def _natural_key(path: str) -> list[Any]:
    # re.split with a group alternates text and digits, so like meets like.
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]


def _steps_in_names(paths: Sequence[str]) -> list[int] | None:
    names = (os.path.basename(path).removesuffix(WEIGHTS).removesuffix(MODEL) for path in paths)
    numbers = [re.search(r"\d+", name) for name in names]
    steps = [int(number[0]) for number in numbers if number]
    rising = len(steps) == len(paths) and all(a < b for a, b in itertools.pairwise(steps))
    return steps if rising else None


@contextlib.contextmanager
def _open_weights(path: str) -> Iterator["h5py.File"]:
    """Opens the HDF5 file of weights that a checkpoint is, or holds. Damage is an `InputError`."""
    import h5py

    with naming_damage(path), contextlib.ExitStack() as stack:
        handle: IO[bytes] = stack.enter_context(files.open_read(path))
        if path.endswith(MODEL):
            archive = stack.enter_context(zipfile.ZipFile(handle))
            handle = stack.enter_context(archive.open("model.weights.h5"))
        yield stack.enter_context(h5py.File(handle, "r"))


@contextlib.contextmanager
def naming_damage(path: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    # What h5py, zipfile, zlib and Keras raise on a file that is cut short or overwritten is
    # anything.
    except Exception as error:
        raise InputError(
            f"{path} cannot be read as a checkpoint, it may be cut short or damaged "
            f"({type(error).__name__}: {error}): save or copy it again, or leave it out"
        ) from error


def _iterations(path: str) -> int | None:
    """The optimizer's count of gradient applications, if the file holds it."""
    import h5py

    with _open_weights(path) as file:
        for name in ("optimizer/inner_optimizer/vars/0", "optimizer/vars/0"):
            variable = file.get(name)
            if (
                isinstance(variable, h5py.Dataset)
                and variable.shape == ()
                and variable.dtype.kind in "iu"
            ):
                return int(variable[()])
    return None


def _stored_rate(path: str, iterations: int | None) -> Any:
    """The learning rate of the last step taken, unchecked, from a .keras file's configuration.

    None if the file holds none. Nothing that it names is executed, but for Keras's own schedules
    with plain values as arguments.
    """
    if not path.endswith(MODEL):
        return None
    with naming_damage(path), files.open_read(path) as handle, zipfile.ZipFile(handle) as archive:
        config = files.parse_json(archive.read("config.json"), f"config.json in {path}")
        optimizer = (config.get("compile_config") or {}).get("optimizer")
        # A model that was never compiled has none, a MultiOptimizer has many learning rates.
        if not optimizer or optimizer["class_name"] == "MultiOptimizer":
            return None
        settings = optimizer["config"]
        if "inner_optimizer" in settings:  # of a LossScaleOptimizer
            settings = settings["inner_optimizer"]["config"]
        rate = settings.get("learning_rate")
        every = settings.get("gradient_accumulation_steps") or 1
        if not isinstance(rate, dict):
            return rate
        if iterations is None:
            raise InputError(
                f"{path} has a learning rate schedule but not its step: give --learning_rate"
            )
        # The last update was at the last whole group of accumulated gradients.
        return _evaluate_schedule(rate, max(iterations // every * every - 1, 0), path)


def _evaluate_schedule(config: dict[str, Any], step: int, path: str) -> float:
    import keras

    schedules = keras.optimizers.schedules
    name, arguments = str(config.get("class_name")), config.get("config")
    schedule: Any = getattr(schedules, name, None)
    known = inspect.isclass(schedule) and issubclass(schedule, schedules.LearningRateSchedule)
    if (
        config.get("module") != "keras.optimizers.schedules"
        or not known
        or not (isinstance(arguments, dict) and all(map(_is_plain, arguments.values())))
    ):
        raise InputError(
            f"The learning rate schedule {name} of {path} is not one of Keras's own, so it is not "
            "evaluated: give --learning_rate"
        )
    return float(schedule.from_config(arguments)(step))


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)


def first_ten(names: list[str]) -> str:
    """The first ten of some names, for a message."""
    return "; ".join(names[:10] + (["..."] if len(names) > 10 else []))
