"""Records parsed to batches of examples."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tracin_beam.errors import InputError, reason
from tracin_beam.gradients import nests, padding
from tracin_beam.inputs.task import Task, in_keras_thread

# What of an example parse gives besides its id.
_EXAMPLE = ("features", "label", "sample_weight")


@dataclasses.dataclass(frozen=True)
class Batch:
    """Parsed examples.

    Attributes:
      features, label, sample_weight: as the task's parse gave them, [n, ...], ragged and sparse
        tensors made dense; None if not given.
      ids: object array [n] of bytes, or None when parse gives no id.
      extents: what of them is each example's own, and no padding; see `padding.Extents`.
      groups: object array [n] of bytes, or None when parse gives no group.
    """

    features: Any
    label: Any
    sample_weight: Any
    ids: np.ndarray | None
    extents: padding.Extents = dataclasses.field(default_factory=dict)
    groups: np.ndarray | None = None

    @property
    def size(self) -> int:
        return int(tf.nest.flatten(self.features)[0].shape[0])

    def take(self, indices: Sequence[int] | np.ndarray) -> "Batch":
        """The examples at these indices."""
        index = tf.constant(np.asarray(indices, np.int64))
        features, label, weight = nests.map_present(
            lambda x: tf.gather(x, index), (self.features, self.label, self.sample_weight)
        )
        ids = None if self.ids is None else self.ids[np.asarray(indices)]
        groups = None if self.groups is None else self.groups[np.asarray(indices)]
        extents = padding.take(self.extents, index.numpy())
        return Batch(features, label, weight, ids, extents, groups)

    def trimmed(self) -> "Batch":
        """Without the padding, of examples that have the same extents."""
        structure = (self.features, self.label, self.sample_weight)
        features, label, weight = padding.trim(structure, self.extents)
        return Batch(features, label, weight, self.ids)


class BatchParser:
    """A task's parse, traced once.

    Raises, when called, whatever TensorFlow raises on records that do not parse.
    """

    def __init__(self, task: Task) -> None:
        signature = [tf.TensorSpec([None], tf.string)]

        def parse(records: tf.Tensor) -> tuple[Any, Any]:
            parsed: Any = task.parse(records)
            if not isinstance(parsed, Mapping):
                return parsed, {}
            given = tuple(parsed.get(key) for key in _EXAMPLE)
            dense, extents = padding.densify(given)
            return {**parsed, **dict(zip(_EXAMPLE, dense, strict=True))}, extents

        self._function = tf.function(parse, input_signature=signature)
        try:
            self._spec, self._extents_spec = in_keras_thread(
                lambda: self._function.get_concrete_function().structured_outputs
            )
        except Exception as error:
            raise InputError(
                "Task.parse cannot be traced for a batch of serialised records, tf.string [B]: "
                + reason(error)
            ) from error
        if not isinstance(self._spec, Mapping) or self._spec.get("features") is None:
            raise InputError('Task.parse must return a dict with "features" (and "label").')
        unknown = set(self._spec) - {*_EXAMPLE, "id", "group"}
        if unknown:
            raise InputError(
                f"Task.parse returns {sorted(unknown)}, which nothing takes; "
                'it may return "id", "group", "features", "label" and "sample_weight".'
            )

    @property
    def gives_ids(self) -> bool:
        return self._spec.get("id") is not None

    @property
    def gives_groups(self) -> bool:
        return self._spec.get("group") is not None

    @property
    def spec(self) -> tuple[Any, Any, Any]:
        """`tf.TensorSpec`s of features, label and sample_weight, as far as they are known."""
        return tuple(self._spec.get(key) for key in _EXAMPLE)

    @property
    def open_axes(self) -> dict[int, int]:
        """By place among the leaves of `spec` that are not None: axes that may be padded."""
        return {place: spec.shape[1] for place, spec in self._extents_spec.items()}

    def __call__(self, records: Sequence[bytes]) -> Batch:
        parsed, extents = self._function(tf.constant(list(records), tf.string))
        for x in tf.nest.flatten(dict(parsed)):
            if x is not None and (x.shape.rank == 0 or x.shape[0] != len(records)):
                raise ValueError(
                    f"parse gave a tensor of shape {x.shape} for {len(records)} records; "
                    "the first axis must be the record"
                )
        ids, groups = (_names(parsed.get(key), key, len(records)) for key in ("id", "group"))
        sizes = {place: x.numpy() for place, x in extents.items()}
        features, label, weight = (parsed.get(key) for key in _EXAMPLE)
        return Batch(features, label, weight, ids, sizes, groups)


def _names(given: Any, key: str, count: int) -> np.ndarray | None:
    """Ids or groups that parse gave, as bytes: object [count]."""
    if given is None:
        return None
    names: np.ndarray = tf.reshape(
        given if given.dtype == tf.string else tf.as_string(given), [-1]
    ).numpy()
    if len(names) != count:
        raise ValueError(f"parse gave {len(names)} {key}s for {count} records")
    return names
