"""Digests of what determines a result, so that a change is noticed and nothing is done twice."""

import json
import re
import types
from typing import Any

import keras

from tracin_beam.config import Config
from tracin_beam.gradients.engine import Engine
from tracin_beam.inputs.task import Task
from tracin_beam.storage import embeddings, runs

# Raised when the same inputs give other results than before.
_VERSION = 3


def of_task(task: Task, engine: Engine, config: Config) -> dict[str, str]:
    """What embeddings depend on besides shards and checkpoints, by what a user calls it."""
    flags = {**config.embedding_flags(), "dim": engine.dim}  # not "auto"
    return {
        "version": f"{_VERSION} {embeddings.LAYOUT}",
        "model": runs.digest(_model(engine.model)),
        "loss": runs.digest(_loss(task.loss)),
        "parse": runs.digest(_code(task.parse)),
        "kind": runs.digest(engine.described_kind()),
        "predict": runs.digest(_code(task.predict)),
        **{name: str(value) for name, value in flags.items()},
    }


def _model(model: keras.Model) -> Any:
    layers = []
    for layer in model._flatten_layers():
        try:
            config = _plain(layer.get_config())
        except Exception:  # a user's layer may not have one; its code stands for it
            config = ""
        own = not type(layer).__module__.startswith("keras.")
        layers.append([type(layer).__qualname__, config, _code(type(layer)) if own else ""])
    return [layers, [[list(v.shape), v.dtype] for v in model.variables]]


def _loss(loss: Any) -> Any:
    if isinstance(loss, str):
        return loss
    if isinstance(loss, keras.losses.Loss):
        try:
            config = _plain(loss.get_config())
        except Exception:  # as above
            config = ""
        own = not type(loss).__module__.startswith("keras.")
        return [type(loss).__qualname__, config, _code(type(loss)) if own else ""]
    return _code(loss)


def _plain(config: Any) -> str:
    """A Keras configuration without the numbers that Keras gives names in each process."""
    text = json.dumps(config, sort_keys=True, default=_code)
    return re.sub(r'_\d+(?=[\\"\'/])', "", text)


def _code(value: Any, depth: int = 0) -> Any:
    """What a function or class does, as far as its own code tells: not its comments or place."""
    if depth > 6:
        return ""
    if isinstance(value, types.MethodType):
        return [_code(value.__func__, depth), _code(vars(value.__self__), depth + 1)]
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [
            _code(value.__code__, depth + 1),
            [_code(x, depth + 1) for x in (value.__defaults__ or ())],
            [_code(x, depth + 1) for x in cells],
            [_code(x, depth + 1) for x in _used_globals(value)],
        ]
    if isinstance(value, types.CodeType):
        constants = [_code(x, depth + 1) for x in value.co_consts]
        return [value.co_code.hex(), list(value.co_names), constants]
    if isinstance(value, type):
        return [
            value.__qualname__,
            {
                k: _code(v, depth + 1)
                for k, v in vars(value).items()
                if not k.startswith("__") or k in ("__init__", "__call__")
            },
        ]
    if isinstance(value, dict):
        return {str(k): _code(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple | frozenset | set):
        items = [_code(x, depth + 1) for x in value]
        return sorted(items, key=repr) if isinstance(value, set | frozenset) else items
    if isinstance(value, str | int | float | bool | bytes | types.NoneType):
        return repr(value)
    if repr(value) != object.__repr__(value):
        return re.sub(r"0x[0-9a-f]+|_\d+(?=\W)", "", repr(value))
    return type(value).__qualname__


def _used_globals(function: types.FunctionType) -> list[Any]:
    """Constants and functions of its own module that a function names."""
    used = [function.__globals__.get(name) for name in function.__code__.co_names]
    return [
        x
        for x in used
        if isinstance(x, str | int | float | bytes | tuple)
        or (isinstance(x, types.FunctionType) and x.__module__ == function.__module__)
    ]
