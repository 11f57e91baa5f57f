"""Which training examples made the model do this, and which of them are wrong: TracIn on Beam."""

import importlib
from typing import TYPE_CHECKING, Any

from tracin_beam._version import __version__
from tracin_beam.errors import InputError

if TYPE_CHECKING:
    from tracin_beam.api import cluster, embed, influence, open, plan, quality, self_influence
    from tracin_beam.inputs.callback import TracInCheckpoint, save_checkpoint
    from tracin_beam.inputs.shards import Parser, write_shards
    from tracin_beam.inputs.task import Task

__all__ = [
    "InputError",
    "Parser",
    "Task",
    "TracInCheckpoint",
    "__version__",
    "cluster",
    "embed",
    "influence",
    "open",
    "plan",
    "quality",
    "save_checkpoint",
    "self_influence",
    "write_shards",
]

# Imported when used: they bring TensorFlow or Beam.
_LAZY = {
    "cluster": "api",
    "embed": "api",
    "influence": "api",
    "open": "api",
    "plan": "api",
    "quality": "api",
    "self_influence": "api",
    "Task": "inputs.task",
    "TracInCheckpoint": "inputs.callback",
    "save_checkpoint": "inputs.callback",
    "Parser": "inputs.shards",
    "write_shards": "inputs.shards",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
