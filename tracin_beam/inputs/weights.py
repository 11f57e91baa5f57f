"""A model's variables and those in a weights file: which belongs to which, saved and loaded.

A `.weights.h5` file, and the one inside a `.keras` archive, addresses a layer by its class and its
place among its siblings, or by an attribute, and a layer's variables by their number. The names of
the layers stand beside that, and in files that `save` writes those of the variables too. Names
decide here where there are any, so that a model which makes the same layers in another order gets
each its own.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any

import h5py
import keras
import ml_dtypes
import numpy as np
from keras.src.saving import saving_lib
from keras.src.utils.naming import to_snake_case

from tracin_beam.errors import InputError
from tracin_beam.inputs import state
from tracin_beam.inputs.checkpoints import (
    MODEL,
    NOTES,
    WEIGHTS,
    check_suffix,
    first_ten,
    naming_damage,
    read_notes,
)
from tracin_beam.storage import files

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Group:
    """What one layer stores: its name, and by key its variables (or arrays, or HDF5 datasets)."""

    name: str | None
    values: dict[str, Any]


class _Recorder(saving_lib.H5IOStore):
    """Keras's walk over a model "saves" into this, which keeps references and copies nothing."""

    def __init__(self) -> None:
        self.groups: dict[str, _Group] = {}

    def __bool__(self) -> bool:
        return True

    def make(self, path: str, metadata: Mapping[str, Any] | None = None) -> dict[str, Any]:
        group = self.groups[path] = _Group((metadata or {}).get("name"), {})
        return group.values


class _Source(saving_lib.H5IOStore):
    """Keras's walk over a model loads from this: by the path of a layer its arrays by key."""

    def __init__(self, arrays: Callable[[str], Mapping[str, np.ndarray]]) -> None:
        self._arrays = arrays

    def __bool__(self) -> bool:
        return True

    def get(self, path: str) -> Mapping[str, np.ndarray]:
        return self._arrays(path)

    def has_path(self, path: str) -> bool:
        return True


class _Arrays(Mapping[str, np.ndarray]):
    """The arrays of a layer, each read when it is asked for."""

    def __init__(self, keys: Iterable[str], read: Callable[[str], np.ndarray]) -> None:
        self._keys, self._read = list(keys), read

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self._keys:
            raise KeyError(key)
        return self._read(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _record(model: keras.Model, skip: Iterable[Any] = ()) -> dict[str, _Group]:
    recorder = _Recorder()
    saving_lib._save_state(
        model,
        weights_store=recorder,
        assets_store=None,
        inner_path="",
        visited_saveables={id(x) for x in skip},
    )
    return recorder.groups


def _is_of_training(value: Any) -> bool:
    return isinstance(value, keras.optimizers.Optimizer | keras.metrics.Metric)


def _of_training(model: keras.Model) -> list[Any]:
    """The optimizers and metrics that hang on a model: they are saved, but are no weights."""
    found = []
    for layer in model._flatten_layers():
        for value in vars(layer).values():
            inside = (
                value.values()
                if isinstance(value, Mapping)
                else value
                if isinstance(value, list | tuple)
                else (value,)
            )
            found += [x for x in inside if _is_of_training(x)]
    return found


def _is_random_state(variable: Any) -> bool:
    return "seed_generator_state" in variable.name


def variables(model: keras.Model) -> list[keras.Variable]:
    """A model's variables without the states of random generators."""
    return [v for v in model.variables if not _is_random_state(v)]


def array(value: Any) -> np.ndarray:
    """The value of a number, a tensor or a variable, also of one that is on several devices."""
    if hasattr(value, "numpy"):
        return np.asarray(value.numpy())
    return np.asarray(keras.ops.convert_to_numpy(value))


def unsaved_reason(found: Iterable[keras.Variable]) -> str:
    """What is wrong with variables that weights files leave out, and what to do."""
    names = [f"{v.path} {tuple(v.shape)}" for v in found]
    return (
        f"{len(names)} of the model's variables are in no file that save_weights writes, so no "
        f"checkpoint holds their trained values: {first_ten(names)}. Keras saves the layers that "
        "an attribute of their parent leads to, by itself or in lists and dicts, if it is not one "
        "of Keras's own such as _layers; and it saves LoRA merged into the kernels. Give the "
        "layers attributes of another name, and train again"
    )


def unsaved(model: keras.Model) -> list[keras.Variable]:
    """The variables of a built model that `model.save_weights` leaves out.

    Keras leaves out layers that no attribute of their parent leads to, or only one that it skips,
    and LoRA's factors, which it merges into the kernels.
    """
    stored = [value for group in _record(model).values() for value in group.values.values()]
    known = {id(value) for value in stored}
    missing = [v for v in variables(model) if id(v) not in known]
    if not missing:
        return []
    # A layer may save copies of its variables.
    copies = collections.defaultdict(list)
    for value in stored:
        if not isinstance(value, keras.Variable):
            copies[tuple(value.shape)].append(array(value))
    return [
        v
        for v in missing
        if not any(np.array_equal(copy, array(v)) for copy in copies[tuple(v.shape)])
    ]


def digest(model: keras.Model) -> str:
    """Identifies the values of a model's weights."""
    found = hashlib.blake2b(digest_size=16)
    for variable in variables(model):
        value = np.ascontiguousarray(array(variable))
        found.update(f"{value.dtype}{value.shape}".encode())
        found.update(value.view(np.uint8).data if value.size and value.ndim else value.tobytes())
    return found.hexdigest()


def save(model: keras.Model, path: str, notes: Mapping[str, Any]) -> None:
    """Writes a `.weights.h5` file that Keras reads, with its variables' names and notes.

    Args:
      model: a built model. Its optimizer's state is saved with it.
      path: on any file system; the file appears there whole or not at all.
      notes: plain values, which `checkpoints.read_notes` gives back.
    """
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, "model" + WEIGHTS)
        model.save_weights(local)
        with h5py.File(local, "r+") as file:
            in_model = {
                _dataset(place, key): value
                for place, group in _record(model).items()
                for key, value in group.values.items()
            }
            in_file = {
                _dataset(place, key): dataset
                for place, group in _groups(file).items()
                for key, dataset in group.values.items()
            }
            # A model that overrides save_weights may save a part of itself.
            for name in in_file if set(in_model) == set(in_file) else ():
                if isinstance(value := in_model[name], keras.Variable):
                    in_file[name].attrs["name"] = value.name
                    in_file[name].attrs["trainable"] = bool(value.trainable)
            file.attrs[NOTES] = json.dumps(notes)
        files.upload(local, path)


def save_like(
    weights_path: str,
    model: keras.Model,
    path: str,
    of_variable: Callable[[keras.Variable], np.ndarray | None],
    notes: Mapping[str, Any],
) -> None:
    """Writes a file like one that `save` wrote, with other numbers for some of its variables.

    The states of optimizers and metrics are left out.

    Args:
      weights_path: that file.
      model: of which it is.
      path: of the new one; it appears there whole or not at all.
      of_variable: what stands for a variable, of its shape; None for its own value.
      notes: as of `save`.

    Raises:
      InputError: the model saves its weights in a way of its own.
    """
    own = _record(model, _of_training(model))
    with tempfile.TemporaryDirectory() as folder, _open(weights_path) as source:
        stored = _groups(source)
        local = os.path.join(folder, "model" + WEIGHTS)
        with h5py.File(local, "w") as file:
            for place, group in own.items():
                there = stored.get(place, _Group(None, {}))
                if set(group.values) != set(there.values):
                    raise InputError(
                        f"{type(model).__name__} saves its weights in a way of its own, in which "
                        "its optimizer's state cannot be told"
                    )
                written = file.create_group(f"{place}/vars".lstrip("/"))
                if group.name is not None:
                    written.attrs["name"] = group.name
                for key, variable in group.values.items():
                    value = of_variable(variable) if isinstance(variable, keras.Variable) else None
                    if value is None:
                        value = _read(there.values[key])
                    if value.dtype == ml_dtypes.bfloat16:  # which HDF5 does not know
                        value = value.astype(np.float32)
                    dataset = written.create_dataset(key, data=value)
                    dataset.attrs["name"] = there.values[key].attrs.get("name", "")
            file.attrs[NOTES] = json.dumps(notes)
        files.upload(local, path)


@contextlib.contextmanager
def _open(path: str) -> Iterator[h5py.File]:
    """Opens the HDF5 file of weights that a checkpoint is, or holds. Damage is an `InputError`."""
    with naming_damage(path), files.local_copy(path) as local, contextlib.ExitStack() as stack:
        source: str | IO[bytes] = local
        if path.endswith(MODEL):
            source = stack.enter_context(tempfile.TemporaryFile())
            with zipfile.ZipFile(local) as archive, archive.open("model.weights.h5") as member:
                while chunk := member.read(1 << 20):  # to its end, which checks the CRC
                    source.write(chunk)
        yield stack.enter_context(h5py.File(source, "r"))


def _groups(file: h5py.File) -> dict[str, _Group]:
    """What a file holds, by the path of a layer."""
    found: dict[str, _Group] = {}

    # Follows no soft or external links.
    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            if item.external or item.is_virtual:
                raise ValueError(f"{name} lies in another file")
            folder, _, key = name.rpartition("/")
        else:
            folder, key = name, ""
        if folder != "vars" and not folder.endswith("/vars"):
            return
        place = folder.removesuffix("vars").removesuffix("/")
        if place not in found:
            label = file[folder].attrs.get("name")
            found[place] = _Group(label if isinstance(label, str) else None, {})
        if key:
            found[place].values[key] = item

    file.visititems(visit)
    return found


def _read(dataset: h5py.Dataset) -> np.ndarray:
    if dataset.attrs.get("dtype") == "bfloat16":
        return np.array(dataset, dtype=ml_dtypes.bfloat16)
    return np.array(dataset)


@dataclasses.dataclass
class _Node:
    """A layer, or a list of layers, which has no group, in the tree of a model or a file."""

    path: str
    group: _Group | None = None
    children: dict[str, "_Node"] = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str | None:
        return self.group.name if self.group else None

    def shapes(self) -> list[Any]:
        own = (
            sorted((k, tuple(v.shape)) for k, v in self.group.values.items()) if self.group else []
        )
        return [own, *((name, child.shapes()) for name, child in sorted(self.children.items()))]


def _tree(groups: Mapping[str, _Group]) -> _Node:
    root = _Node("")
    places = [place for place, group in groups.items() if group.values]
    for place in places:
        node, path = root, ""
        node.group = groups.get("")
        for part in place.split("/") if place else ():
            path = f"{path}/{part}".lstrip("/")
            node = node.children.setdefault(part, _Node(path, groups.get(path)))
    return root


def _number(name: str) -> int:
    found = re.search(r"_(\d+)$", name)
    return int(found[1]) if found else 0


def _family(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


class _Pairing:
    """Which layer and which variable of a file is which of the model.

    Names that users gave decide. Names that Keras made up count the layers of a class that a
    process has made, so of them only their order means anything. It must agree with the places.
    """

    def __init__(self, classes: set[str], where: str) -> None:
        self._classes, self._where = classes, where
        self.renamed: list[str] = []

    def pairs(self, model: _Node, file: _Node) -> Iterator[tuple[_Node, _Node]]:
        """Pairs of layers of a model and a file, from the given two down."""
        yield model, file
        whole = model.group is not None or file.group is not None
        families = {"" if whole else _family(name) for name in model.children}
        for family in sorted(families):

            def of_family(children: dict[str, _Node], family: str = family) -> list[_Node]:
                names = [n for n in children if whole or _family(n) == family]
                return [children[n] for n in sorted(names, key=lambda n: (_family(n), _number(n)))]

            for in_model, in_file in self._siblings(
                of_family(model.children), of_family(file.children), by_place=not whole
            ):
                yield from self.pairs(in_model, in_file)

    def _given(self, label: str | None) -> bool:
        """Whether a layer's name was given by a user, and not made up by Keras."""
        return label is not None and (
            re.sub("^(forward|backward)_", "", _family(label)) not in self._classes
        )

    def _siblings(
        self, model: list[_Node], file: list[_Node], by_place: bool
    ) -> list[tuple[_Node, _Node]]:
        labels = [collections.Counter(node.label for node in nodes) for nodes in (model, file)]
        by_name = {node.label: node for node in file}
        named = [
            (node, by_name[node.label])
            for node in model
            if self._given(node.label) and labels[0][node.label] == labels[1][node.label] == 1
        ]
        used = {id(node) for pair in named for node in pair}
        model = [node for node in model if id(node) not in used]
        file = [node for node in file if id(node) not in used]
        if by_place:
            others = self._by_order(model, file)
        else:
            attributes = {os.path.basename(node.path): node for node in file}
            others = [
                (node, attributes[name])
                for node in model
                if (name := os.path.basename(node.path)) in attributes
            ]
        self.renamed += [
            f"{in_file.label} → {in_model.label}"
            for in_model, in_file in others
            if self._given(in_model.label) and self._given(in_file.label)
        ]
        return named + others

    def _by_order(self, model: list[_Node], file: list[_Node]) -> list[tuple[_Node, _Node]]:
        places = list(zip(model, file, strict=False))
        labels = [(in_model.label, in_file.label) for in_model, in_file in places]
        if len(model) != len(file) or any(
            in_model is None or in_file is None or self._given(in_model) or self._given(in_file)
            for in_model, in_file in labels
        ):
            return places
        made = list(
            zip(
                *(sorted(x, key=lambda n: _number(n.label or "")) for x in (model, file)),
                strict=True,
            )
        )
        if {(a.path, b.path) for a, b in made} == {(a.path, b.path) for a, b in places}:
            return places
        if all(in_model == in_file for in_model, in_file in labels):
            return places
        fitting = [
            pairs for pairs in (places, made) if all(a.shapes() == b.shapes() for a, b in pairs)
        ]
        if len(fitting) == 2:
            listed = ", ".join(
                f"{a.path} ({a.label} here, {b.label} there)" for a, b in places[:10]
            )
            raise InputError(
                f"The layers of the model stand in another order than those in {self._where}, and "
                f"have no names of their own to tell which is which: {listed}. Make them in the "
                "order in which the training made them, or give them in the task the names that "
                "they have in the file"
            )
        return fitting[0] if fitting else places

    def keys(self, model: _Group, file: _Group) -> dict[str, str]:
        """Which variable of a layer in the file is which in the model, by their keys."""
        in_model = {k: v.name for k, v in model.values.items() if isinstance(v, keras.Variable)}
        in_file = {k: d.attrs.get("name") for k, d in file.values.items()}
        by_name = {name: key for key, name in in_file.items()}
        same = sorted(in_model.values()) == sorted(map(str, by_name))
        told = same and len(by_name) == len(in_file)
        if told and not any(_family(name) == "variable" for name in in_model.values()):
            return {key: by_name[name] for key, name in in_model.items()}
        return {key: key for key in model.values if key in file.values}


class WeightsLoader:
    """Sets a built model's weights from `.weights.h5` and `.keras` files.

    Each variable is proven to come from a file: two loads of made-up values must give it two
    values. This changes the model's weights. The states of random generators stay as they are,
    optimizers and metrics too.

    Raises:
      InputError: the model is not built.
    """

    def __init__(self, model: keras.Model) -> None:
        if not model.built:
            raise InputError(
                "Weights cannot be loaded into a model that is not built: begin it with "
                "keras.Input, or call it once on an example"
            )
        self._model = model
        self._variables = variables(model)
        self._skipped = _of_training(model)
        self._own = _record(model, self._skipped)
        self._of_training = set(_record(model)) - set(self._own)
        self._classes = {to_snake_case(type(x).__name__) for x in model._flatten_layers()}
        self._told: set[str] = set()
        self._proven = False
        self._first: tuple[str, state.Outside] | None = None

    def _prove(self) -> None:
        first, second = self._after_loading(0), self._after_loading(1)
        same = [v for v, a, b in zip(self._variables, first, second, strict=True) if a == b]
        if same := [v for v in same if math.prod(v.shape)]:
            raise InputError(unsaved_reason(same))

    def _after_loading(self, constant: int) -> list[int]:
        def arrays(place: str) -> Mapping[str, np.ndarray]:
            values = self._own[place].values if place in self._own else {}

            def read(key: str) -> np.ndarray:
                dtype = keras.backend.standardize_dtype(values[key].dtype)
                return np.broadcast_to(np.asarray(constant, dtype), tuple(values[key].shape))

            return _Arrays(values, read)

        self._load(arrays)
        return [zlib.crc32(np.ascontiguousarray(array(v)).tobytes()) for v in self._variables]

    def _load(self, arrays: Callable[[str], Mapping[str, np.ndarray]]) -> None:
        failures: dict[int, Any] = {}
        saving_lib._load_state(
            self._model,
            weights_store=_Source(arrays),
            assets_store=None,
            inner_path="",
            visited_saveables={id(x) for x in self._skipped},
            failed_saveables=set(),
            error_msgs=failures,
        )
        for saveable, error in failures.values():
            raise InputError(f"{getattr(saveable, 'name', saveable)} does not load: {error}")

    def load(self, path: str) -> None:
        """Sets the model's weights from a file on any file system.

        Raises:
          InputError: the file is missing or damaged; its variables are not the model's, which
            the message lists with their shapes; or names and places contradict each other: the
            model stays as it is. Or the model has variables that no weights file holds, or a
            weight is NaN or infinite.
        """
        check_suffix(path)
        with _open(path) as file:
            stored = {p: g for p, g in _groups(file).items() if not self._is_of_training(p, g)}
            sources = self._sources(stored, path)
            if not self._proven:
                self._prove()
                self._proven = True

            def arrays(place: str) -> Mapping[str, np.ndarray]:
                found = sources.get(place, {})
                return _Arrays(found, lambda key: _read(found[key]))

            self._tell_frozen(sources, path)
            self._load(arrays)
        self._check_numbers(path)
        self._check_state(path)

    def _is_of_training(self, place: str, group: _Group) -> bool:
        """Whether a group in a file belongs to an optimizer or a metric."""
        if place in self._own:
            return False
        parts = place.split("/")
        if place in self._of_training or parts[0] == "optimizer" or "seed_generator" in parts:
            return True
        if "layers" in parts or not group.values:
            return False
        counts = group.values.get("0")
        counted = counts is not None and counts.shape == () and counts.dtype.kind in "iu"
        return counted or all(value.shape == () for value in group.values.values())

    def _sources(
        self, stored: Mapping[str, _Group], path: str
    ) -> dict[str, dict[str, h5py.Dataset]]:
        """By the path of a layer of the model, the file's datasets by the layer's keys."""
        pairing = _Pairing(self._classes, path)
        sources: dict[str, dict[str, h5py.Dataset]] = {}
        used = set()
        for in_model, in_file in pairing.pairs(_tree(self._own), _tree(stored)):
            if in_model.group and in_file.group:
                keys = pairing.keys(in_model.group, in_file.group)
                sources[in_model.path] = {
                    k: in_file.group.values[there] for k, there in keys.items()
                }
                used |= {(in_file.path, there) for there in keys.values()}
        missing, differing = [], []
        for place, group in self._own.items():
            for key, value in group.values.items():
                name, shape = _dataset(place, key), tuple(value.shape)
                there = sources.get(place, {}).get(key)
                if there is None:
                    missing.append(f"{name} {shape}")
                elif there.shape != shape:
                    differing.append(f"{name}: the model has {shape}, the file {there.shape}")
        lists = {
            "with another shape": differing,
            "missing from the file": missing,
            "not in the model": [
                f"{_dataset(place, key)} {value.shape}"
                for place, group in stored.items()
                for key, value in group.values.items()
                if (place, key) not in used
            ],
        }
        problems = [f"{len(x)} {what}: " + first_ten(x) for what, x in lists.items() if x]
        if problems:
            raise InputError(
                f"The weights in {path} are not of this model. Variables "
                + ";\n".join(problems)
                + ".\nBuild the architecture that was trained, or give its own checkpoints"
            )
        if renamed := set(pairing.renamed) - self._told:
            self._told |= renamed
            _log.warning(
                "Layers in %s have other names in the model, so their places decide: %s",
                path,
                first_ten(sorted(renamed)),
            )
        return sources

    def _tell_frozen(self, sources: Mapping[str, Mapping[str, h5py.Dataset]], path: str) -> None:
        """Says once which weights count, though they were frozen when a checkpoint was saved."""
        trained = {id(v) for v in self._model.trainable_variables}
        frozen = {
            value.path
            for place, group in self._own.items()
            for key, value in group.values.items()
            if id(value) in trained and not sources[place][key].attrs.get("trainable", True)
        }
        if untold := sorted(frozen - self._told):
            self._told |= frozen
            _log.warning(
                "Weights that were frozen in the training up to %s count at that checkpoint, "
                "because they are trainable in the task's model: %s. To leave them out of all "
                "checkpoints, freeze them in the task's model or choose --layers",
                path,
                first_ten(untold),
            )

    def _check_numbers(self, path: str) -> None:
        trained = {id(v) for v in self._model.trainable_variables}
        for variable in self._variables:
            value = array(variable)
            if value.dtype.kind in "iub":
                continue
            value = value.astype(np.float32, copy=False)
            # A constant, such as a mask, may hold infinities.
            bad = np.isnan(value) if id(variable) not in trained else ~np.isfinite(value)
            if bad.any():
                raise InputError(
                    f"{int(bad.sum())} of the {bad.size} numbers of the weight {variable.path} in "
                    f"{path} are not finite (the first is {value[bad][0]}): the training had "
                    "diverged. Leave this checkpoint out"
                )

    def _check_state(self, path: str) -> None:
        """Refuses what a checkpoint has beside variables if the model does not have the same."""
        if path.endswith(MODEL):
            with (
                naming_damage(path),
                files.local_copy(path) as local,
                zipfile.ZipFile(local) as archive,
            ):
                wanted = state.adapted_in_archive(archive)
        else:
            wanted = read_notes(path).get("state") or []
        if wanted and (missing := state.missing(wanted, self._model)):
            raise InputError(
                f"The model in {path} has another {first_ten(missing)} than the model that the "
                "task builds. These are no variables, so they cannot be loaded: let the task build "
                "the model with the values of the training, which all checkpoints must share"
            )
        outside = state.outside(self._model)
        first, before = self._first = self._first or (path, outside)
        if changed := state.differences(before, outside):
            raise InputError(
                f"{path} sets {first_ten(changed)} to another value than {first} does. That is no "
                "variable, so one checkpoint would be computed with another's: make it one, with "
                "add_weight, or give checkpoints that share it"
            )


def _dataset(place: str, key: str) -> str:
    return f"{place}/vars/{key}".lstrip("/")
