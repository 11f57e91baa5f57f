"""Per-example losses.

An example's loss ℓ(z) is what Keras computes for a batch of z alone: whatever the reduction of
the loss, the masks and the sample weights, it never depends on what shares the batch.
"""

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras.src.losses.losses import LossFunctionWrapper

from tracin_beam.errors import InputError
from tracin_beam.gradients import nests

# (label, output of the model, sample_weight) -> float32 [B]
PerExample = Callable[[Any, Any, Any], tf.Tensor]


def per_example_loss(loss: Any) -> PerExample:
    """A function (label, output, sample_weight) -> float32 [B] for any loss Keras accepts.

    Args:
      loss: a `keras.losses.Loss`, the name of one, or a function of (y_true, y_pred) that gives
        a value for each example, or for each of its positions, or one for the whole batch (which
        is then called with one example at a time).
    """
    resolved = _resolve(loss)

    def compute(label: Any, output: Any, sample_weight: Any) -> tf.Tensor:
        loss_object = resolved
        if not isinstance(resolved, keras.losses.Loss) and tf.is_tensor(output):
            # As Keras does with a function: label and output are brought to the same rank.
            loss_object = LossFunctionWrapper(resolved)
        if isinstance(loss_object, keras.losses.Loss):
            if type(loss_object).__call__ is keras.losses.Loss.__call__:
                values = _loss_values(loss_object, label, output)
                if _by_example(values, output):
                    mask = _combined_mask(output, values)
                    if mask is None or mask.shape.rank <= values.shape.rank:
                        return reduce_per_example(
                            values, sample_weight, mask, loss_object.reduction
                        )
            return _one_at_a_time(loss_object, label, output, sample_weight)
        values = tf.convert_to_tensor(resolved(label, output))
        if _by_example(values, output):
            return reduce_per_example(values, sample_weight, None, "sum_over_batch_size")

        def weighted(y: Any, p: Any, sample_weight: Any = None) -> tf.Tensor:
            value = tf.reduce_mean(resolved(y, p))
            return value if sample_weight is None else value * tf.reduce_sum(sample_weight)

        return _one_at_a_time(weighted, label, output, sample_weight)

    return compute


def whole_batch_loss(loss: Any) -> Callable[[Any, Any], tf.Tensor]:
    """A function (label, output) -> the loss of the batch as Keras trains with it, summed."""
    resolved = _resolve(loss)

    def compute(label: Any, output: Any) -> tf.Tensor:
        whole = resolved
        if not isinstance(resolved, keras.losses.Loss) and tf.is_tensor(output):
            whole = LossFunctionWrapper(resolved)
        return tf.reduce_sum(whole(label, output))

    return compute


def describe(loss: Any) -> str:
    """The loss in words, for messages: its class or function."""
    resolved = _resolve(loss)
    function = getattr(resolved, "fn", resolved)
    name = getattr(function, "__name__", type(function).__name__)
    return "an anonymous function" if name == "<lambda>" else name


def _resolve(loss: Any) -> Any:
    try:
        resolved = keras.losses.get(loss)
    except (ValueError, TypeError) as error:
        raise InputError(f"Task(loss={loss!r}): {error}") from error
    if not callable(resolved):
        raise InputError(
            f"Task(loss={loss!r}) is neither a Keras loss, nor the name of one, nor a function. "
            "For a model with several outputs write a function of (labels, outputs) that adds up "
            "their losses, each with its weight."
        )
    return resolved


def _by_example(values: tf.Tensor, output: Any) -> bool:
    """Whether the values of a loss have the batch as their first axis."""
    batch = tf.nest.flatten(output)[0].shape[0]
    return values.shape.rank != 0 and (batch is None or values.shape[0] == batch)


def reduce_per_example(
    values: tf.Tensor, sample_weight: Any, mask: Any, reduction: str | None
) -> tf.Tensor:
    """Keras's reduction, over each example's own positions: [B, ...] to float32 [B].

    Args:
      values: [B, ...], losses by position.
      sample_weight: [B] or [B, ...], or None.
      mask: bool, of at most the rank of values, or None.
      reduction: as in `keras.losses.Loss`; "none" is a sum, as there is nothing else to be
        differentiated.
    """
    values = tf.cast(values, tf.float32)
    weight = None
    if mask is not None:
        valid = tf.cast(mask, tf.float32)
        if reduction in ("mean", "sum_over_batch_size"):
            # An example's own mean is over the positions that are not masked.
            axes = list(range(1, valid.shape.rank))
            total = tf.reduce_sum(tf.ones_like(valid), axis=axes, keepdims=True)
            valid *= tf.math.divide_no_nan(total, tf.reduce_sum(valid, axis=axes, keepdims=True))
        weight = valid
    if sample_weight is not None:
        given = tf.cast(sample_weight, tf.float32)
        if weight is not None:
            given = _aligned(given, weight)
            given *= _aligned(weight, given)
        weight = given
    if weight is not None:
        values *= _aligned(weight, values)
        if reduction == "mean_with_sample_weight":
            divisor = tf.reduce_sum(tf.reshape(weight, [tf.shape(weight)[0], -1]), axis=1)
            return tf.math.divide_no_nan(_sum(values), divisor)
    if reduction in ("sum", "none", None):
        return _sum(values)
    return tf.reduce_mean(tf.reshape(values, [tf.shape(values)[0], -1]), axis=1)


def _sum(values: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(values, axis=list(range(1, values.shape.rank)))


def _aligned(weight: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    if weight.shape.rank == values.shape.rank + 1 and weight.shape[-1] == 1:
        return tf.squeeze(weight, -1)
    while weight.shape.rank < values.shape.rank:
        weight = tf.expand_dims(weight, -1)
    return weight


def _loss_values(loss: keras.losses.Loss, label: Any, output: Any) -> tf.Tensor:
    def cast(x: Any) -> Any:
        if x.dtype == tf.string:
            return x
        return tf.cast(x, loss.dtype)

    output = tf.nest.map_structure(cast, output)
    label = tf.nest.map_structure(cast, label)
    return tf.convert_to_tensor(loss.call(label, output))


def _combined_mask(output: Any, values: tf.Tensor) -> Any:
    found = (getattr(x, "_keras_mask", None) for x in (output, values))
    masks = [tf.cast(mask, tf.bool) for mask in found if mask is not None]
    return functools.reduce(tf.logical_and, masks) if masks else None


# What Keras keeps of a tensor's making, and its losses look for.
_ATTRIBUTES = ("_keras_mask", "_keras_logits")


def _one_at_a_time(loss: Any, label: Any, output: Any, sample_weight: Any) -> tf.Tensor:
    structure = (label, output, sample_weight)
    attributes = [[getattr(x, name, None) for name in _ATTRIBUTES] for x in tf.nest.flatten(output)]

    def one(example: tuple[list[tf.Tensor], list[tf.Tensor]]) -> tf.Tensor:
        given, kept = tf.nest.map_structure(lambda x: tf.expand_dims(x, 0), example)
        y, p, w = nests.repack(structure, given)
        for x, values in zip(tf.nest.flatten(p), nests.repack(attributes, kept), strict=True):
            for name, value in zip(_ATTRIBUTES, values, strict=True):
                if value is not None:
                    setattr(x, name, value)
        value = loss(y, p) if w is None else loss(y, p, sample_weight=w)
        return tf.cast(tf.reduce_sum(value), tf.float32)

    return tf.vectorized_map(one, (nests.present(structure), nests.present(attributes)))
