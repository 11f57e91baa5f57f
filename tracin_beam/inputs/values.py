"""A value of a user's program as plain data that is the same in every process that computes it.

Two values that would give other embeddings give other data: numbers, strings, containers, arrays,
tensors, look-up tables, vocabularies, data frames, losses, layers, partial functions, and functions
with what they close over. Where a value does not say what it holds, its type stands for it and its
description is kept, so that a message can name it.
"""

import dataclasses
import datetime
import enum
import functools
import hashlib
import inspect
import logging
import os
import re
import sys
import types
import uuid
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tracin_beam.inputs import sources

_AUTOMATIC_MODULE = re.compile(r"_tracin_task_[0-9a-f]+")
_TIMES = (datetime.date, datetime.time, datetime.timedelta, uuid.UUID, types.GeneratorType)


class Values:
    """Makes plain data of values.

    Attributes:
      unknown: descriptions of values that do not say what they hold.
    """

    def __init__(self, root: str, known_source: Callable[[str], bool]) -> None:
        """A reader of values.

        Args:
          root: folder of the task, which in strings is left out: it may be moved.
          known_source: whether the source of a module of this name, and all global values in it,
            are compared by other means.
        """
        self.unknown: dict[str, None] = {}
        self._root = root
        self._known_source = known_source
        # With the value, or its id might be given again.
        self._seen: dict[int, tuple[Any, Any]] = {}

    def plain(self, value: Any) -> Any:
        """JSON-like data for any value."""
        if value is None or isinstance(value, bool | int | float | complex | bytes):
            return [type(value).__name__, repr(value)]
        if isinstance(value, str):
            return self._text(value)
        if id(value) in self._seen:
            return self._seen[id(value)][1]
        self._seen[id(value)] = (value, "in itself")
        found = self._object(value)
        self._seen[id(value)] = (value, found)
        return found

    def _text(self, text: str) -> str:
        return _AUTOMATIC_MODULE.sub("task", text.replace(self._root, "") if self._root else text)

    def _object(self, value: Any) -> Any:
        if isinstance(value, np.ndarray | np.generic):
            return _array(np.asarray(value)) or self._items(value.tolist())
        if isinstance(value, Mapping):
            return {self._key(k): self.plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [type(value).__name__, *self._items(value)]
        if isinstance(value, set | frozenset):
            return ["set", *sorted(self._items(value), key=repr)]
        if isinstance(value, enum.Enum):
            return [type(value).__qualname__, value.name]
        if isinstance(value, os.PathLike):
            return self._text(os.fspath(value) if isinstance(os.fspath(value), str) else "")
        if isinstance(value, re.Pattern):
            return ["pattern", self._text(str(value.pattern)), value.flags]
        if isinstance(value, range | slice):
            return repr(value)
        if isinstance(value, _TIMES):
            return type(value).__qualname__  # another in every process
        if isinstance(value, types.ModuleType):
            return ["module", self._text(value.__name__)]
        if isinstance(value, functools.partial):
            return [
                "partial",
                self.plain(value.func),
                self._items(value.args),
                self.plain(value.keywords),
            ]
        if isinstance(value, types.MethodType):
            return ["method", self.plain(value.__func__), self.plain(value.__self__)]
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.BuiltinFunctionType | types.MethodDescriptorType | np.ufunc):
            return [getattr(value, "__module__", ""), value.__name__]
        if isinstance(inner := getattr(value, "python_function", None), types.FunctionType):
            return ["tf.function", self.plain(inner)]
        if "tensorflow" in sys.modules and (found := self._tensorflow(value)) is not None:
            return found
        if "pandas" in sys.modules and (found := self._pandas(value)) is not None:
            return found
        return self._instance(value)

    def _items(self, values: Any) -> list[Any]:
        return [self.plain(x) for x in values]

    def _key(self, key: Any) -> str:
        return self._text(key) if isinstance(key, str) else repr(self.plain(key))

    def _function(self, value: types.FunctionType) -> Any:
        wrapped = inspect.unwrap(value)
        found: list[Any] = ["function", self._text(f"{wrapped.__module__}.{wrapped.__qualname__}")]
        if not is_users(wrapped.__module__):
            return found
        found.append(self._source(wrapped))
        if not self._known_source(wrapped.__module__):
            found.append(self._globals(wrapped))
        cells = []
        for function in dict.fromkeys([value, wrapped]):
            for cell in function.__closure__ or ():
                try:
                    cells.append(self.plain(cell.cell_contents))
                except ValueError:  # it is empty
                    cells.append("empty")
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return [*found, cells, self._items(defaults)]

    def _class(self, value: type) -> Any:
        found: list[Any] = ["class", self._text(f"{value.__module__}.{value.__qualname__}")]
        if not is_users(value.__module__):
            return found
        found.append(self._source(value))
        held = {
            name: attribute
            for name, attribute in vars(value).items()
            if not name.startswith("__") and not isinstance(attribute, _MEMBERS)
        }
        found.append(self.plain(held))
        if not self._known_source(value.__module__):
            for member in vars(value).values():
                function = getattr(member, "__func__", member)
                if isinstance(function, types.FunctionType):
                    found.append(self._globals(function))
        return [*found, [self.plain(base) for base in value.__bases__ if base is not object]]

    def _source(self, value: Any) -> Any:
        try:
            return sources.of_function(inspect.getsource(value), _loggers(value))
        except (OSError, TypeError, SyntaxError, IndexError):
            code = getattr(value, "__code__", None)
            return _bytecode(code) if code else ""

    def _globals(self, function: types.FunctionType) -> dict[str, Any]:
        """Values of the global names that a function uses, and of what it takes from modules."""
        found = {}
        for name in sorted(_names(function.__code__)):
            if name not in function.__globals__:
                continue
            value = function.__globals__[name]
            if isinstance(value, types.ModuleType) and is_users(value.__name__):
                held = {
                    k: v
                    for k, v in vars(value).items()
                    if not k.startswith("__") and not isinstance(v, types.ModuleType)
                }
                found[name] = self.plain(held)
            else:
                found[name] = self.plain(value)
        return found

    def _tensorflow(self, value: Any) -> Any:
        """What TensorFlow and Keras objects hold; None for others."""
        import tensorflow as tf

        if isinstance(value, tf.Tensor | tf.Variable):
            return _array(value.numpy()) if hasattr(value, "numpy") else ["tensor", repr(value)]
        if isinstance(value, tf.RaggedTensor | tf.SparseTensor):
            return [
                type(value).__name__,
                *self._items(tf.nest.flatten(value, expand_composites=True)),
            ]
        if isinstance(value, tf.DType | tf.TensorShape | tf.TensorSpec):
            return repr(value)
        if isinstance(value, tf.lookup.experimental.DenseHashTable) or hasattr(value, "export"):
            try:
                keys, values = value.export()
            except Exception:  # it is no table, or in a graph
                return None
            return ["table", self._sorted_pairs(keys, values)]
        if isinstance(value, tf.lookup.StaticVocabularyTable):
            return ["vocabulary", self.plain(value._table), value._num_oov_buckets]
        import keras

        if isinstance(value, keras.Variable):
            return _array(value.numpy())
        if not type(value).__module__.startswith("keras.") and not isinstance(
            value, keras.Layer | keras.losses.Loss
        ):
            return None
        return self.keras(value)

    def model(self, value: Any) -> Any:
        """All layers of a model, and its variables' shapes."""
        names = _automatic_names(value)
        layers = [self.keras(layer, names) for layer in value._flatten_layers()]
        return [layers, [[list(v.shape), v.dtype] for v in value.variables]]

    def _sorted_pairs(self, keys: Any, values: Any) -> list[Any]:
        pairs = zip(keys.numpy().tolist(), values.numpy().tolist(), strict=True)
        return sorted(map(repr, pairs))

    def keras(self, value: Any, names: Mapping[str, str] | None = None) -> list[Any]:
        """A Keras object: its class, configuration, vocabulary, and what a user's class adds.

        Args:
          value: a layer, model, loss or other object of Keras.
          names: stable names by those that Keras gave layers of its model.
        """
        found: list[Any] = [type(value).__qualname__]
        try:
            names = names or _automatic_names(value)
            found.append(self.plain(_unnumbered(value.get_config(), names)))
        except Exception:  # a user's object may not have one; its code and attributes stand for it
            found.append("")
        if callable(getattr(value, "get_vocabulary", None)):
            found.append(self.plain(list(value.get_vocabulary())))
        if isinstance(function := getattr(value, "fn", None), types.FunctionType):
            found += [self.plain(function), self.plain(getattr(value, "_fn_kwargs", {}))]
        if is_users(type(value).__module__):
            found += [self.plain(type(value)), self.plain(_attributes(value))]
        return found

    def _pandas(self, value: Any) -> Any:
        import pandas as pd

        if isinstance(value, pd.DataFrame):
            return ["frame", {str(name): self.plain(value[name].to_numpy()) for name in value}]
        if isinstance(value, pd.Series | pd.Index):
            return ["series", self.plain(value.to_numpy())]
        return None

    def _instance(self, value: Any) -> Any:
        kind = type(value)
        if dataclasses.is_dataclass(value) or is_users(kind.__module__):
            return [self.plain(kind), self.plain(_attributes(value))]
        name = f"{kind.__module__}.{kind.__qualname__}"
        self.unknown[name] = None
        return ["unknown", name]


_MEMBERS = (
    types.FunctionType,
    staticmethod,
    classmethod,
    property,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    type,
)


def is_users(module: str | None) -> bool:
    """Whether a module is neither a library's nor Python's nor this package's own."""
    name = module or ""
    if name.split(".")[0] in ("tracin_beam", "pipelines", "builtins"):
        return False
    path = getattr(sys.modules.get(name), "__file__", None)
    if path is None or name == "__main__":  # a notebook, or what was made by exec
        return name not in sys.builtin_module_names
    return not is_library(path)


@functools.cache
def _libraries() -> tuple[str, ...]:
    import sysconfig

    names = ("purelib", "platlib", "stdlib", "platstdlib")
    return tuple({os.path.realpath(sysconfig.get_path(name)) + os.sep for name in names})


@functools.cache
def is_library(path: str) -> bool:
    """Whether a file is one of an installed package or of Python."""
    return os.path.realpath(path).startswith(_libraries())


def _attributes(value: Any) -> dict[str, Any]:
    """A user's object's own attributes, without Keras's bookkeeping."""
    found = dict(getattr(value, "__dict__", {}))
    for slot in getattr(type(value), "__slots__", ()):
        if isinstance(slot, str) and hasattr(value, slot):
            found[slot] = getattr(value, slot)
    import keras

    if isinstance(value, keras.losses.Loss | keras.Layer):
        plain = (keras.Layer, keras.Variable)
        found = {
            k: v
            for k, v in found.items()
            if not k.startswith("_") and k not in _BOOKKEEPING and not isinstance(v, plain)
        }
    return found


_BOOKKEEPING = ("name", "built", "dtype_policy", "input_spec", "supports_jit", "quantization_mode")


def _array(array: np.ndarray) -> list[Any] | None:
    if array.dtype == object or array.dtype.hasobject:
        return None
    content = np.ascontiguousarray(array).tobytes()
    return [
        "array",
        array.dtype.str,
        list(array.shape),
        hashlib.blake2b(content, digest_size=16).hexdigest(),
    ]


def _automatic_names(value: Any) -> dict[str, str]:
    """Names that Keras made up for a model's layers and operations → the same in every process."""
    layers = value._flatten_layers() if hasattr(value, "_flatten_layers") else []
    found: dict[str, str] = {}
    for layer in layers:
        # A functional model's graph has operations that are no layers, as masks have.
        for named in (layer, *getattr(layer, "operations", ())):
            stem = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", type(named).__name__)
            stem = re.sub(r"([a-z])([A-Z])", r"\1_\2", stem).lower()
            if re.fullmatch(rf"{re.escape(stem)}(_\d+)?", named.name):
                found.setdefault(named.name, f"{stem} {len(found)}")
    return found


# Where a functional model's configuration names layers and operations.
_PLACES = ("keras_history", "input_layers", "output_layers")


def _unnumbered(config: Any, names: Mapping[str, str], is_place: bool = False) -> Any:
    """A configuration without the numbers that Keras gives names in each process, and seeds.

    Args:
      config: of a Keras object, or a part of it.
      names: from `_automatic_names`.
      is_place: whether text in it names a layer. Elsewhere the same word may be an activation.
    """
    if isinstance(config, dict):
        return {
            k: names.get(v, re.sub(r"_\d+$", "", v))
            if k == "name" and isinstance(v, str)
            else _unnumbered(v, names, is_place or k in _PLACES)
            for k, v in config.items()
            if k != "seed"
        }
    if isinstance(config, list | tuple):
        return [_unnumbered(x, names, is_place) for x in config]
    if isinstance(config, str):
        if re.fullmatch(r"keras_tensor(_\d+)?(CLONE)?", config):
            return "keras_tensor"
        return names.get(config, config) if is_place else config
    return config


def _loggers(value: Any) -> set[str]:
    """Names under which a function's or class's module knows loggers."""
    module = getattr(value, "__globals__", None) or vars(sys.modules.get(value.__module__, types))
    quiet = (logging, warnings)
    return {
        n for n, x in module.items() if isinstance(x, logging.Logger) or any(x is q for q in quiet)
    }


def _names(code: types.CodeType) -> set[str]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _bytecode(code: types.CodeType) -> list[Any]:
    """What stands for a function without source, such as one that was made by exec."""
    constants = [_bytecode(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), constants]
