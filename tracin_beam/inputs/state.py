"""What a model computes with that is no variable: vocabularies, tables, bins, constant tensors.

A weights file does not hold it, or Keras puts it where no traced function looks again. So it must
be the same in every checkpoint, and in every process that builds the model.
"""

import hashlib
import json
import os
import pathlib
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

# By class, what its configuration holds that `adapt` finds out.
_ADAPTED = {
    "Normalization": ("mean", "variance"),
    "Discretization": ("bin_boundaries",),
    "StringLookup": ("vocabulary",),
    "IntegerLookup": ("vocabulary",),
    "TextVectorization": ("vocabulary",),
}
_OF_EVERY_LAYER = {*vars(keras.layers.Layer()), *vars(keras.Model())}

# By the place of a layer and its attribute: how to call it, and the digest of its value.
Outside = dict[tuple[int, str], tuple[str, str]]


def outside(model: keras.Model, numbers: bool = True) -> Outside:
    """Digests of the arrays, tensors, tables and numbers that are attributes of layers.

    The statistics of a Normalization are left out: they are read from its variables.

    Args:
      model: a built model.
      numbers: whether Python's numbers are looked at too, which may be arbitrary seeds.
    """
    found: Outside = {}
    for place, layer in enumerate(model._flatten_layers()):
        for name, value in vars(layer).items():
            if name in _OF_EVERY_LAYER:
                continue
            if isinstance(layer, keras.layers.Normalization) and name in ("mean", "variance"):
                continue
            if (content := _content(value, numbers)) is not None:
                digest = hashlib.blake2b(content, digest_size=16).hexdigest()
                found[place, name] = (f"{layer.name}.{name}", digest)
    return found


def _content(value: Any, numbers: bool) -> bytes | None:
    """What identifies the value of an attribute; None if it is nothing that one computes with."""
    if isinstance(value, keras.Variable):
        return None
    if isinstance(value, int | float):
        return repr(value).encode() if numbers else None
    if isinstance(value, list | tuple) and value:
        parts = [_content(x, numbers) for x in value]
        return None if None in parts else repr(parts).encode()
    if tf.is_tensor(value) and hasattr(value, "numpy"):  # not symbolic; a tf.Variable too
        value = value.numpy()
    if isinstance(value, np.ndarray | np.generic):
        value = np.asarray(value)
        content = repr(value.tolist()).encode() if value.dtype == object else value.tobytes()
        return f"{value.dtype}{value.shape}".encode() + content
    if isinstance(value, tf.lookup.StaticHashTable | tf.lookup.experimental.MutableHashTable):
        keys, values = (x.numpy().tolist() for x in value.export())
        return repr(sorted(zip(keys, values, strict=True))).encode()
    return None


def differences(first: Outside, second: Outside) -> list[str]:
    """The attributes, "layer.attribute", whose digests are not the same."""
    keys = {**first, **second}
    nothing = ("", "")
    return [
        keys[key][0] for key in keys if first.get(key, nothing)[1] != second.get(key, nothing)[1]
    ]


def adapted(model: keras.Model) -> list[list[str]]:
    """What weights files do not hold of what `adapt` finds: [layer, what, digest] of each."""
    found = []
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Normalization | keras.layers.Discretization):
            config = {key: getattr(layer, f"input_{key}", None) for key in ("mean", "variance")}
            config["bin_boundaries"] = getattr(layer, "bin_boundaries", None)
            found += list(_of_config(type(layer).__name__, layer.name, config))
        elif hasattr(layer, "get_vocabulary") and hasattr(layer, "lookup_table"):
            for special in (True, False):
                words = layer.get_vocabulary(include_special_tokens=special)
                found.append([layer.name, "vocabulary", _digest(map(str, words))])
        elif hasattr(layer, "save_assets") and not hasattr(layer, "get_vocabulary"):
            with tempfile.TemporaryDirectory() as folder:
                layer.save_assets(folder)
                for parent, _, names in os.walk(folder):
                    for name in names:
                        content = pathlib.Path(parent, name).read_bytes()
                        found.append([layer.name, f"asset {name}", _digest([content.hex()])])
    return found


def _of_config(kind: str, name: str, config: dict[str, Any]) -> Iterator[list[str]]:
    for what in _ADAPTED.get(kind, ()):
        value = config.get(what)
        if value is None or isinstance(value, str):  # a vocabulary may be the path of a file
            continue
        if what == "vocabulary":
            yield [name, what, _digest(map(str, value))]
        else:
            flat = np.asarray(value, np.float32).ravel().tolist()
            yield [name, what, _digest(map(repr, flat))]


def _digest(words: Iterable[str]) -> str:
    return hashlib.blake2b(json.dumps(list(words)).encode(), digest_size=16).hexdigest()


def adapted_in_archive(archive: zipfile.ZipFile) -> list[list[str]]:
    """As `adapted`, for the model in a `.keras` file: [layer, what, digest] of each."""
    found: list[list[str]] = []
    configs: list[Any] = [json.loads(archive.read("config.json"))]
    while configs:
        node = configs.pop()
        if isinstance(node, dict):
            config = node.get("config")
            if isinstance(config, dict):
                name = str(config.get("name"))
                found += list(_of_config(str(node.get("class_name")), name, config))
            configs += node.values()
        elif isinstance(node, list):
            configs += node
    for member in archive.namelist():
        if not member.startswith("assets/") or member.endswith("/"):
            continue
        *_, layer, file = member.split("/")
        content = archive.read(member)
        if file == "vocabulary.txt":
            words = content.decode().splitlines()
            while words and not words[-1]:
                words.pop()
            found.append([layer, "vocabulary", _digest(words)])
        else:
            found.append([layer, f"asset {file}", _digest([content.hex()])])
    return found


def missing(wanted: Iterable[list[str]], model: keras.Model) -> list[str]:
    """What of a checkpoint's adapted state the model does not have, as "what of layer"."""
    present = [entry[1:] for entry in adapted(model)]
    return [f"{what} of {name}" for name, what, digest in wanted if [what, digest] not in present]
