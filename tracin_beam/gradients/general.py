"""The general way: a vector-Jacobian product for each example, of one layer or of the whole model.

For the weights whose use no rule knows: what is run for each example is the smallest call of a
layer that has all of it, on that layer's own inputs and output gradients; the whole model only for
weights that are used outside of any. `tf.vectorized_map` makes batched operations of the loop over
examples, chunk by chunk, so that memory stays bounded. Loops, as of recurrent layers, are left
loops (vectorised they are no faster and take many times longer to trace), and so is what has
another length for each example, and whatever `tf.vectorized_map` gives up on or would make an
unsafe product of.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf

# What the examples that are computed at a time may take together, in bytes.
BYTES = 256 << 20

# Numbers on the way for each number that is kept: the activations, their gradients, copies.
_COPIES = 4


def per_example(
    function: Callable[[list[tf.Tensor]], list[tf.Tensor]],
    batch: Sequence[tf.Tensor],
    outputs: Sequence[tf.TensorShape | Sequence[int]],
    numbers: int,
) -> list[tf.Tensor]:
    """function of each example by itself.

    To be called while tracing, with a static number of examples.

    Args:
      function: what one example's tensors, [...], give: float32 tensors.
      batch: [B, ...] each.
      outputs: shapes of what the function gives.
      numbers: how many numbers the function holds for an example.

    Returns:
      float32 [B, *shape] for each of the outputs.
    """
    size = int(batch[0].shape[0])
    chunk = chunk_size(size, numbers)
    signature = [tf.TensorSpec(x.shape[1:], x.dtype) for x in batch]
    one = tf.function(
        lambda *example: function(list(example)), input_signature=signature, autograph=False
    ).get_concrete_function()
    specs = [tf.TensorSpec(shape, tf.float32) for shape in outputs]
    many = (
        None
        if any(o.type in _ALONE for o in operations(one.graph))
        else _vectorised(function, batch, chunk)
    )
    if many is None:
        found = tf.map_fn(
            lambda example: list(one(*example)),
            list(batch),
            fn_output_signature=specs,
            parallel_iterations=_parallel(numbers),
        )
    elif chunk == size:
        found = list(many(*batch))
    else:
        parts = [tf.reshape(x, [size // chunk, chunk, *_lengths(x)]) for x in batch]
        several = [tf.TensorSpec([chunk, *spec.shape], tf.float32) for spec in specs]
        found = tf.map_fn(
            lambda part: list(many(*part)),
            parts,
            fn_output_signature=several,
            parallel_iterations=1,
        )
        found = [tf.reshape(x, [size, *x.shape[2:]]) for x in found]
    return [tf.ensure_shape(x, [size, *s.shape]) for x, s in zip(found, specs, strict=True)]


# Operations that give out what they were given, in another shape at most.
_VIEWS = {
    "Identity",
    "IdentityN",
    "Reshape",
    "ExpandDims",
    "Squeeze",
    "StopGradient",
    "Placeholder",
}
# Operations for which a batch is no better than a loop, or whose outputs' lengths depend on what
# they are given.
_ALONE = {
    "While", "StatelessWhile", "Where", "Unique", "UniqueV2", "UniqueWithCounts", "ListDiff",
    "DynamicPartition", "NonMaxSuppressionV3", "NonMaxSuppressionV4", "NonMaxSuppressionV5",
    "SparseFillEmptyRows", "StringSplitV2", "UnicodeTokenizeWithOffsets", "RaggedRange",
}  # fmt: skip


def chunk_size(size: int, numbers: int) -> int:
    """The largest divisor of a batch's size of which the examples fit into BYTES together."""
    fitting = max(1, BYTES // (4 * _COPIES * max(numbers, 1)))
    return next(n for n in range(min(size, fitting), 0, -1) if size % n == 0)


def _parallel(numbers: int) -> int:
    return max(1, min(10, BYTES // (4 * _COPIES * max(numbers, 1))))


def _lengths(x: tf.Tensor) -> list[Any]:
    return [n if n is not None else tf.shape(x)[1 + a] for a, n in enumerate(x.shape[1:])]


def _vectorised(
    function: Callable[[list[tf.Tensor]], list[tf.Tensor]], batch: Sequence[tf.Tensor], chunk: int
) -> Callable[..., list[tf.Tensor]] | None:
    if any(x.dtype == tf.string for x in batch):
        return None
    signature = [tf.TensorSpec([chunk, *x.shape[1:]], x.dtype) for x in batch]
    mapped = tf.function(
        lambda *part: tf.vectorized_map(lambda example: function(list(example)), list(part)),
        input_signature=signature,
        autograph=False,
    )
    try:
        traced = mapped.get_concrete_function()
    except Exception:  # its converters fail in many ways
        return None
    return None if unsafe_products(operations(traced.graph)) else traced


def unsafe_products(operations: Iterable[tf.Operation]) -> bool:
    """Whether one of them is a product of four axes or more that broadcasts an operand.

    TensorFlow 2.20 on a processor with AMX crashes on it.
    """
    for operation in operations:
        if operation.type in ("BatchMatMulV2", "BatchMatMulV3"):
            left, right = (x.shape for x in operation.inputs[:2])
            if left.rank is None or right.rank is None:
                return True
            known = left[:-2].is_fully_defined() and right[:-2].is_fully_defined()
            if max(left.rank, right.rank) > 3 and not (known and left[:-2] == right[:-2]):
                return True
    return False


def operations(graph: Any) -> Iterator[tf.Operation]:
    """All operations of a graph and of the functions that it calls."""
    seen: set[str] = set()
    waiting = [graph]
    while waiting:
        part = waiting.pop()
        yield from part.get_operations()
        for name, function in part._functions.items():
            if name not in seen:
                seen.add(name)
                if getattr(function, "graph", None) is not None:
                    waiting.append(function.graph)


def size_of(operations: Sequence[tf.Operation], examples: int) -> int:
    """About how many numbers these operations give out for each example."""
    total = 0
    for operation in operations:
        for x in operation.outputs:
            if x.shape.rank and x.shape[0] == examples and operation.type not in _VIEWS:
                total += math.prod(n or 128 for n in x.shape[1:])
    return total
