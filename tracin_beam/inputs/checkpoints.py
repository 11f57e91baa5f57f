"""The checkpoints of a training run: which there are, and their weights."""

import contextlib
import inspect
import itertools
import json
import logging
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

_log = logging.getLogger(__name__)

LISTING = "checkpoints.json"
WEIGHTS = ".weights.h5"
MODEL = ".keras"
# The attribute of a weights file's root in which `weights.save` puts its notes, as JSON.
NOTES = "tracin_beam"
# No training has a larger learning rate; products of gradients with one would overflow.
_LARGEST_RATE = 1e6
_MOST_ENTRIES = 10_000


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
      spec: a directory that `TracInCheckpoint` or `save_checkpoint` wrote; or a glob, or a comma
        separated list, of `.weights.h5` or `.keras` files. A list of paths is in training
        order. What a glob finds is put in the order of the steps that the files know (those
        that this package wrote do, others from their optimizer), or else of their names with
        numbers taken as numbers; then `step` is the first number in their base names if that
        rises strictly, else 1, 2, ...
      learning_rate: one for all checkpoints, or one for each in training order. Needed for
        `.weights.h5` files of others; `.keras` files know theirs, unless its schedule is not
        Keras's own.

    Raises:
      InputError: there is no checkpoint, one cannot be read, its learning rate is not known or
        not a number from 0 to a million, or all are 0; two have the same step or are the same
        file; or their order is not certain.
    """
    if files.exists(listing := files.join(spec, LISTING)):
        checkpoints = _read_listing(spec, listing, learning_rate)
    elif spec.endswith((WEIGHTS, MODEL)) or re.search(r"[*?\[,]", spec):
        checkpoints = _read_files(spec, learning_rate)
    else:
        if said := _other_kind(spec):
            raise InputError(said)
        if files.is_local(spec) and os.path.isfile(spec):
            check_suffix(spec)
        _check_kinds_in(spec)
        raise InputError(
            f"There is no {LISTING} in {spec!r}: give a directory that TracInCheckpoint wrote, "
            f"or a glob of {WEIGHTS} or {MODEL} files, such as '{files.join(spec, '*' + WEIGHTS)}'"
        )
    _check_history(checkpoints)
    return checkpoints


def _check_history(checkpoints: Sequence[Checkpoint]) -> None:
    seen: dict[str, Checkpoint] = {}
    for one in checkpoints:
        other = seen.setdefault(files.absolute(one.path), one)
        if other is not one:
            raise InputError(
                f"{one.path} is listed twice, at steps {other.step} and {one.step}: leave one out"
            )
    for earlier, later in itertools.pairwise(checkpoints):
        if earlier.step >= later.step:
            relation = (
                "have the same step" if earlier.step == later.step else "are not in training order"
            )
            raise InputError(
                f"{earlier.path} (step {earlier.step}) and {later.path} (step {later.step}) "
                f"{relation}: leave one out, or put them right. Files of several stages of a "
                "training are taken as a comma separated list, in training order"
            )
    useless = [one.path for one in checkpoints if not one.learning_rate]
    if len(useless) == len(checkpoints):
        raise InputError(
            f"The learning rate of every checkpoint is 0 ({first_ten(useless)}), so every score "
            "would be 0: give the learning rates of the training"
        )
    if useless:
        _log.warning("Checkpoints with the learning rate 0 count nothing: %s", first_ten(useless))


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
        check_suffix(path)
        if not files.exists(path):
            raise InputError(
                f"{path} is missing, but entry {i} of {listing} names it: bring it back, or "
                "delete the entry"
            )
        rate = given if given is not None else entry.get("learning_rate")
        rate = checked_rate(rate, f"entry {i} of {listing}")
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
    if len(entries) > _MOST_ENTRIES:
        raise InputError(f"{listing} lists {len(entries)} checkpoints, more than {_MOST_ENTRIES}")
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise InputError(f"Entry {i} of {listing} must be an object, not {entry!r}")
        for key, kind in (("path", str), ("step", int)):
            if not isinstance(entry.get(key), kind) or isinstance(entry[key], bool):
                what = f"{key!r} is {entry[key]!r}" if key in entry else f"{key!r} is missing"
                raise InputError(
                    f"Entry {i} of {listing}: {what}, it must be of type {kind.__name__}"
                )
        if not 0 <= entry["step"] < 1 << 63:
            raise InputError(f"Entry {i} of {listing}: 'step' must be from 0 to 2^63")
        path = entry["path"]
        # The file may come from elsewhere: it names nothing outside its folder.
        parts = path.split("/")
        if not path.isprintable() or not path or "\\" in path or {"", ".", ".."} & set(parts):
            raise InputError(
                f"Entry {i} of {listing}: 'path' is {path[:200]!r}, it must be a path below the "
                "directory, relative to it"
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


def checked_rate(rate: Any, where: str) -> float:
    """A learning rate as a float, if it is one that a training may have.

    Raises:
      InputError: it is not, or not known; the message says of what (`where`).
    """
    if rate is None:
        raise InputError(f"No learning rate is known for {where}: give it with --learning_rate")
    if not isinstance(rate, int | float) or isinstance(rate, bool):
        raise InputError(f"The learning rate of {where} must be a number, not {rate!r}")
    if not 0 <= rate < math.inf:
        raise InputError(
            f"The learning rate of {where} is {rate}: it must be finite and at least 0"
        )
    if rate > _LARGEST_RATE:
        raise InputError(
            f"The learning rate of {where} is {str(rate)[:20]}: no training has one above "
            f"{_LARGEST_RATE:g}. Give the one that was used"
        )
    return float(rate)


def _read_files(spec: str, learning_rate: Sequence[float] | float | None) -> list[Checkpoint]:
    try:
        each = [patterns.match(part) for part in patterns.split(spec)]
    except InputError:
        _check_kinds_in(spec.rpartition("/")[0])
        raise
    listed = len(each) > 1 and all(len(found) == 1 for found in each)
    infos = [found[0] for found in each] if listed else patterns.match(spec)
    paths = [info.path for info in infos]
    for path in paths:
        check_suffix(path)
    headers = {path: _header(path) for path in paths}
    notes = {path: header[0] for path, header in headers.items()}
    counts = {path: header[1] for path, header in headers.items()}
    known = [notes[path].get("step", counts[path]) for path in paths]
    steps = [step for step in known if isinstance(step, int)]
    # They are all 0 where the optimizer was not what trained the model.
    if len(steps) < len(paths) or not any(steps):
        if not listed:
            paths.sort(key=_natural_key)
        steps = _steps_in_names(paths) or list(range(1, len(paths) + 1))
    elif listed:
        for (one, before), (other, after) in itertools.pairwise(zip(paths, steps, strict=True)):
            if before == after and _same_weights(one, other):
                raise InputError(f"{one} and {other} hold the same weights: leave one out")
        steps = _counted_on(steps)
    else:
        by_path = dict(zip(paths, steps, strict=True))
        if not all("step" in notes[path] for path in paths):
            _check_one_count(by_path)
        paths.sort(key=by_path.__getitem__)
        steps = [by_path[path] for path in paths]
    rates = _given_rates(learning_rate, len(paths))
    checkpoints = []
    for path, step, given in zip(paths, steps, rates, strict=True):
        rate = given if given is not None else notes[path].get("learning_rate")
        rate = rate if rate is not None else _stored_rate(path, counts[path])
        checkpoints.append(Checkpoint(path, step, None, checked_rate(rate, path)))
    stored = {c.learning_rate for c in checkpoints if c.path.endswith(MODEL)}
    if learning_rate is None and len(stored) > 1:
        _log.warning(
            "The learning rates in %s files are those at the time of saving. A callback that "
            "lowers the rate at the end of an epoch may have done so before: if there was one, "
            "give the rates that were used with --learning_rate",
            MODEL,
        )
    return checkpoints


def _same_weights(one: str, other: str) -> bool:
    import h5py

    with _open_weights(one) as first, _open_weights(other) as second:
        names: list[str] = []
        first.visititems(
            lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None
        )
        of_model = [name for name in names if not name.startswith("optimizer/")]
        return all(
            name in second and (first[name][()] == second[name][()]).all() for name in of_model
        )


def _counted_on(steps: Sequence[int]) -> list[int]:
    """Steps over several stages of training, in each of which an optimizer began to count anew."""
    total: list[int] = []
    offset = 0
    for before, step in itertools.pairwise([-1, *steps]):
        if step <= before:
            offset = total[-1]
        total.append(offset + step)
    return total


def _check_one_count(steps: dict[str, int]) -> None:
    """Refuses files whose optimizers may have counted in several stages of a training.

    There is no doubt that it was one count where the files' names, or a number in them, rise with
    the steps.
    """
    paths = sorted(steps, key=lambda path: (steps[path], _natural_key(path)))
    names = [[int(n) for n in re.findall(r"\d+", os.path.basename(path))] for path in paths]
    rising = [all(a < b for a, b in itertools.pairwise(x)) for x in zip(*names, strict=False)]
    if sorted(paths, key=_natural_key) != paths and not any(rising):
        shown = [f"{os.path.basename(path)} (step {steps[path]})" for path in paths]
        raise InputError(
            f"The steps that the files' optimizers have counted contradict the files' names: "
            f"{first_ten(shown)}. If they are of several stages of a training, each with an "
            "optimizer of its own, give the paths as a comma separated list in training order"
        )


def check_suffix(path: str) -> None:
    """Raises an InputError if a path is not that of a `.weights.h5` or `.keras` file."""
    if not path.endswith((WEIGHTS, MODEL)):
        raise InputError(
            _other_kind(path)
            or f"{path} is not a checkpoint that can be read: its name must end in {WEIGHTS} or "
            f"{MODEL}. Save checkpoints of other kinds again with model.save_weights"
        )


def _check_kinds_in(folder: str) -> None:
    """Raises an InputError about the first checkpoint of an older kind in a folder, if any."""
    for pattern in ("saved_model.pb", "*/saved_model.pb", "*.index", "*.h5", "*.hdf5"):
        try:
            found = patterns.match(files.join(folder, pattern))
        except (InputError, OSError):
            continue
        for info in found:
            if not info.path.endswith(WEIGHTS) and (said := _other_kind(info.path)):
                raise InputError(said)


def _other_kind(path: str) -> str | None:
    """What to do about a checkpoint of an older kind, if it is one."""
    folder = path.removesuffix("/")
    prefix = re.sub(r"\.(index|data-\d+-of-\d+)$", "", folder)
    if folder.endswith("saved_model.pb") or files.exists(files.join(folder, "saved_model.pb")):
        model = folder.removesuffix("saved_model.pb").removesuffix("/")
        values = files.join(model, "variables", "variables")
        found = _saved_attributes(values)
        if "variables" in found or not found:  # by model.export or Keras 2
            saved = f"tf.saved_model.load({model!r}).variables"
            load = f"[v.assign(w) for v, w in zip(model.variables, {saved}, strict=True)]"
        else:  # by tf.saved_model.save
            load = _read_as("model", values)
        return _convert(path, "a SavedModel", load, model)
    if prefix != folder or files.exists(prefix + ".index"):
        found = _saved_attributes(prefix) - _NOT_THE_MODEL
        if any(name.startswith(_OF_MODELS) for name in found):
            saved = "model"
        else:
            saved = f"{found.pop() if len(found) == 1 else 'model'}=model"
        load = _read_as(saved, prefix)
        return _convert(path, "a checkpoint of tf.train.Checkpoint", load, prefix)
    if os.path.basename(folder) == "checkpoint" or files.exists(files.join(folder, "checkpoint")):
        return (
            f"{path} belongs to checkpoints of tf.train.Checkpoint: give the path of one of them "
            "(a file that ends in .index), to be told how to make a weights file of it"
        )
    if folder.endswith((".h5", ".hdf5", ".weights.json")):
        load = f"model.load_weights({folder!r})"
        kind = "one of several files" if folder.endswith(".json") else "an HDF5 file"
        stem = re.sub(r"(\.weights)?\.\w+$", "", folder)
        return _convert(path, f"{kind} of another kind", load, stem)
    return None


_HDF5 = b"\x89HDF"


def _renamed(path: str) -> str:
    """What to do about a file of an older kind under the name of a newer one."""
    stem = path.removesuffix(MODEL).removesuffix(WEIGHTS)
    old = stem + ".h5"
    return (
        f"{path} is an HDF5 file of an older kind, whatever its name. Make a weights file of it, "
        "with the model as the task builds it:\n"
        f"    os.rename({path!r}, {old!r})\n"
        f"    model.load_weights({old!r})\n"
        f"    model.save_weights({stem + WEIGHTS!r})"
    )


# TensorFlow's checkpoints leave out layers in lists and dicts of a model of Keras 3, in silence.
_FORGET = "[v.assign(v * float('nan')) for v in model.weights if 'float' in v.dtype]"
_PROVE = "[tf.debugging.assert_all_finite(v, v.path) for v in model.weights if 'float' in v.dtype]"


def _convert(path: str, kind: str, load: str, stem: str) -> str:
    lines = [load, f"model.save_weights({stem + WEIGHTS!r})"]
    checked = ""
    if "tf." in load:
        lines = [_FORGET, load, _PROVE, lines[-1]]
        checked = ", and see that none of its weights is missing there"
    return (
        f"{path} is {kind}. Make a weights file of it, with the model as the task builds it"
        + checked
        + ":"
        + "".join(f"\n    {line}" for line in lines)
    )


# What a tf.train.Checkpoint commonly holds beside the model, and what names of a model's own
# attributes begin with.
_NOT_THE_MODEL = {"save_counter", "optimizer", "opt", "step", "global_step", "epoch", "iterator"}
_OF_MODELS = ("_layers", "_functional", "layer-", "layer_with_weights-", "keras_api", "variables")


def _read_as(saved: str, prefix: str) -> str:
    read = f"tf.train.Checkpoint({saved}).read({prefix!r})"
    return f"{read}.assert_existing_objects_matched()"


def _saved_attributes(prefix: str) -> set[str]:
    """Names of the attributes of what was saved in TensorFlow's format; none if it cannot be read.

    Args:
      prefix: what the paths of its files begin with.
    """
    import tensorflow as tf
    from tensorflow.core.protobuf import trackable_object_graph_pb2

    graph = trackable_object_graph_pb2.TrackableObjectGraph()
    try:
        saved = tf.train.load_checkpoint(prefix).get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH")
        graph.ParseFromString(saved)
        return {child.local_name for child in graph.nodes[0].children}
    except Exception:  # whatever is the matter with it, TensorFlow will tell who runs the lines
        return set()


def moments_of(path: str) -> str:
    """Where the optimizer's second moments at a checkpoint lie, where the training kept them."""
    folder, _, name = path.rpartition("/")
    return files.join(folder, "optimizer", name.removesuffix(MODEL).removesuffix(WEIGHTS) + WEIGHTS)


def read_notes(path: str) -> dict[str, Any]:
    """What `weights.save` noted in a file: its step, learning rate and others; of others nothing.

    Raises:
      InputError: the file is damaged.
    """
    return _header(path)[0]


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
    """Opens the HDF5 file that a checkpoint is, or holds, to read a little of it."""
    import h5py

    with naming_damage(path), contextlib.ExitStack() as stack:
        handle: IO[bytes] = stack.enter_context(files.open_read(path))
        if path.endswith(MODEL):
            if handle.read(len(_HDF5)) == _HDF5:
                raise InputError(_renamed(path))
            handle.seek(0)
            archive = stack.enter_context(zipfile.ZipFile(handle))
            handle = stack.enter_context(archive.open("model.weights.h5"))
        file = stack.enter_context(h5py.File(handle, "r"))
        if "layer_names" in file.attrs or "model_weights" in file:
            raise InputError(_renamed(path))
        yield file


@contextlib.contextmanager
def naming_damage(path: str) -> Iterator[None]:
    """Makes an InputError of whatever reading a damaged checkpoint raises."""
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


def _header(path: str) -> tuple[dict[str, Any], int | None]:
    """A file's notes, and its optimizer's count of gradient applications, if it holds that."""
    import h5py

    with _open_weights(path) as file:
        notes = json.loads(file.attrs.get(NOTES, "{}"))
        notes = notes if isinstance(notes, dict) else {}
        for name in ("optimizer/inner_optimizer/vars/0", "optimizer/vars/0"):
            variable = file.get(name)
            if (
                isinstance(variable, h5py.Dataset)
                and variable.shape == ()
                and variable.dtype.kind in "iu"
            ):
                return notes, int(variable[()])
    return notes, None


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
