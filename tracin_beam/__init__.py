"""Which training examples made the model do this, and which of them are wrong: TracIn on Beam."""

import importlib
from typing import TYPE_CHECKING, Any

from tracin_beam._version import __version__
from tracin_beam.errors import InputError
from tracin_beam.task import Task

if TYPE_CHECKING:
    from tracin_beam.callbacks import TracInCheckpoint
    from tracin_beam.shards import Parser, write_shards

__all__ = ["InputError", "Parser", "Task", "TracInCheckpoint", "__version__", "write_shards"]

# Imported when used: they bring TensorFlow or Beam.
_LAZY = {"TracInCheckpoint": "callbacks", "Parser": "shards", "write_shards": "shards"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
