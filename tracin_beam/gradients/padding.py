"""Features of varying length: made dense by padding, which must not change what an example is.

`fit` takes ragged and sparse tensors and makes them dense by zeros, up to the longest of the
batch. An example alone has no padding at all: that is what its loss and gradient are defined by.
Where the model masks the padding nothing differs, and examples are padded together. Where it does
not, those of one length go together.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tracin_beam.gradients import nests

# int64 [n, k], each example's own size along the k axes after the first, which may be padded; by
# the leaf's place among those that are not None.
Extents = Mapping[int, Any]


def densify(structure: Any) -> tuple[Any, dict[int, tf.Tensor]]:
    """Makes ragged and sparse tensors dense, as `fit` does: by zeros, or empty strings.

    Returns:
      The structure, and `Extents` of the leaves that were padded.
    """
    leaves, extents = [], {}
    for place, x in enumerate(nests.present(structure)):
        if isinstance(x, tf.RaggedTensor):
            extents[place] = _ragged_extent(x)
            leaves.append(x.to_tensor())
        elif isinstance(x, tf.SparseTensor):
            if any(n is None for n in x.shape[1:]):
                extents[place] = _sparse_extent(x)
            leaves.append(tf.ensure_shape(tf.sparse.to_dense(tf.sparse.reorder(x)), x.shape))
        else:
            leaves.append(x)
    return nests.repack(structure, leaves), extents


def _ragged_extent(x: tf.RaggedTensor) -> tf.Tensor:
    sizes = []
    for axis in range(1, x.ragged_rank + 1):
        lengths = tf.cast(x.row_lengths(axis=axis), tf.int64)
        while lengths.shape.rank > 1:
            lengths = tf.reduce_max(lengths, axis=1)
        sizes.append(tf.maximum(lengths, 0))  # the greatest of none is below zero
    return tf.stack(sizes, axis=1)


def _sparse_extent(x: tf.SparseTensor) -> tf.Tensor:
    ends = tf.math.unsorted_segment_max(x.indices[:, 1:] + 1, x.indices[:, 0], x.dense_shape[0])
    return tf.maximum(ends, 0)


def take(extents: Extents, indices: np.ndarray) -> dict[int, np.ndarray]:
    """The extents of the examples at these indices."""
    return {place: np.asarray(x)[indices] for place, x in extents.items()}


def groups(extents: Extents, most: int) -> list[np.ndarray]:
    """Indices of the examples that have the same extents, at most so many together."""
    rows = np.concatenate([np.asarray(x) for x in extents.values()], axis=1)
    _, group = np.unique(rows, axis=0, return_inverse=True)
    together = [np.flatnonzero(group.ravel() == g) for g in range(group.max() + 1)]
    return [some[i : i + most] for some in together for i in range(0, len(some), most)]


def trim(structure: Any, extents: Extents) -> Any:
    """Removes the padding from examples that have the same extents."""

    def trimmed(place: int, x: tf.Tensor) -> tf.Tensor:
        if place not in extents:
            return x
        sizes = np.asarray(extents[place])[0]
        return x[(slice(None), *(slice(0, int(n)) for n in sizes))]

    leaves = nests.present(structure)
    return nests.repack(structure, [trimmed(i, x) for i, x in enumerate(leaves)])


def extend(structure: Any, extents: Extents, count: int) -> Any:
    """Pads by so many more along each axis that may be padded."""

    def extended(place: int, x: tf.Tensor) -> tf.Tensor:
        for axis in range(1, np.shape(extents[place])[1] + 1 if place in extents else 1):
            shape = [count if i == axis else n for i, n in enumerate(x.shape)]
            x = tf.concat([x, tf.zeros(shape, x.dtype)], axis)
        return x

    leaves = nests.present(structure)
    return nests.repack(structure, [extended(i, x) for i, x in enumerate(leaves)])


def widths(structure: Any) -> Sequence[tuple[int, ...]]:
    """The shapes of the leaves without the axis of the examples."""
    return [tuple(x.shape[1:]) for x in nests.present(structure)]
