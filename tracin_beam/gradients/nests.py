"""Nested structures of tensors in which a part may be None, as with examples without a label."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf


def present(structure: Any) -> list[Any]:
    """The leaves that are not None, in order."""
    return [x for x in tf.nest.flatten(structure) if x is not None]


def repack(structure: Any, leaves: Sequence[Any]) -> Any:
    """The inverse of `present`: leaves in the places of those of structure that are not None."""
    remaining = iter(leaves)
    filled = [None if x is None else next(remaining) for x in tf.nest.flatten(structure)]
    return tf.nest.pack_sequence_as(structure, filled)


def map_present(function: Callable[[Any], Any], structure: Any) -> Any:
    """Applies a function to the leaves that are not None."""
    return repack(structure, [function(x) for x in present(structure)])
