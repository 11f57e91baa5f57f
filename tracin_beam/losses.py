"""Per-example losses and what else of an example may be differentiated.

An example's loss ℓ(z) is what Keras computes for a batch of z alone: whatever the reduction of
the loss, the masks and the sample weights, it never depends on what shares the batch.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras.src.losses.losses import LossFunctionWrapper

from tracin_beam import nests
from tracin_beam.errors import InputError

# (label, output of the model, sample_weight) -> float32 [B]
PerExample = Callable[[Any, Any, Any], tf.Tensor]


def per_example_loss(loss: Any) -> PerExample:
    """A function (label, output, sample_weight) -> float32 [B] for any loss Keras accepts.

    Args:
      loss: a `keras.losses.Loss`, the name of one, or a function of (y_true, y_pred) that gives
        a value for each example, or for each of its positions, or one for the whole batch (which
        is then called with one example at a time).
    """
    resolved = keras.losses.get(loss)
    if resolved is None or not callable(resolved):
        raise InputError(f"Task(loss={loss!r}) is neither a Keras loss, nor a name, nor a function.")

    def compute(label: Any, output: Any, sample_weight: Any) -> tf.Tensor:
        loss_object = resolved
        same = _same_structure(label, output)
        if not isinstance(resolved, keras.losses.Loss) and same:
            loss_object = LossFunctionWrapper(resolved)
        if isinstance(loss_object, keras.losses.Loss):
            if type(loss_object).__call__ is keras.losses.Loss.__call__:
                values = _loss_values(loss_object, label, output)
                if values.shape.rank != 0:
                    mask = _combined_mask(output, values)
                    return reduce_per_example(values, sample_weight, mask, loss_object.reduction)
            return _one_at_a_time(loss_object, label, output, sample_weight)
        values = tf.convert_to_tensor(resolved(label, output))
        if values.shape.rank == 0:

            def weighted(y: Any, p: Any, sample_weight: Any = None) -> tf.Tensor:
                value = tf.reduce_mean(resolved(y, p))
                return value if sample_weight is None else value * tf.reduce_sum(sample_weight)

            return _one_at_a_time(weighted, label, output, sample_weight)
        return reduce_per_example(values, sample_weight, None, "sum_over_batch_size")

    return compute


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
        weight = given if weight is None else _aligned(given, weight) * _aligned(weight, given)
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


def _same_structure(label: Any, output: Any) -> bool:
    try:
        tf.nest.assert_same_structure(label, output)
    except (ValueError, TypeError):
        return False
    return True


def _loss_values(loss: keras.losses.Loss, label: Any, output: Any) -> tf.Tensor:
    def cast(x: Any) -> Any:
        if x.dtype == tf.string:
            return x
        return tf.cast(x, loss.dtype)

    output = tf.nest.map_structure(cast, output)
    label = tf.nest.map_structure(cast, label)
    return tf.convert_to_tensor(loss.call(label, output))


def _combined_mask(output: Any, values: tf.Tensor) -> Any:
    masks = [getattr(x, "_keras_mask", None) for x in (output, values)]
    masks = [tf.cast(mask, tf.bool) for mask in masks if mask is not None]
    return None if not masks else masks[0] if len(masks) == 1 else masks[0] & masks[1]


def _one_at_a_time(loss: Any, label: Any, output: Any, sample_weight: Any) -> tf.Tensor:
    structure = (label, output, sample_weight)

    def one(example: list[tf.Tensor]) -> tf.Tensor:
        y, p, w = nests.repack(structure, [tf.expand_dims(x, 0) for x in example])
        value = loss(y, p) if w is None else loss(y, p, sample_weight=w)
        return tf.cast(tf.reduce_sum(value), tf.float32)

    return tf.vectorized_map(one, nests.present(structure))


def predictions(output: Any, label: Any, classifier: bool) -> tf.Tensor:
    """What the model says of each example, as a number: float32 [B], NaN where it is not one.

    The class for a classifier's scores [B, K > 1], the value itself for [B] and [B, 1].
    """
    if tf.is_tensor(output):
        output = tf.cast(output, tf.float32)
        if output.shape.rank == 1:
            return output
        if output.shape.rank == 2 and output.shape[1] == 1:
            return output[:, 0]
        if output.shape.rank == 2 and classifier:
            return tf.cast(tf.argmax(output, axis=1), tf.float32)
    batch = tf.shape(tf.nest.flatten(output)[0])[0]
    return tf.fill([batch], float("nan"))


def labels(label: Any, output: Any, classifier: bool) -> tf.Tensor:
    """The label as a number: float32 [B], NaN where it is not one. One-hot labels give the class."""
    if tf.is_tensor(label) and label.dtype != tf.string:
        label = tf.cast(label, tf.float32)
        if label.shape.rank == 1:
            return label
        if label.shape.rank == 2 and label.shape[1] == 1:
            return label[:, 0]
        if label.shape.rank == 2 and classifier:
            return tf.cast(tf.argmax(label, axis=1), tf.float32)
    batch = tf.shape(tf.nest.flatten(output)[0])[0]
    return tf.fill([batch], float("nan"))


_CLASSIFICATION = (
    "categorical",
    "sparse_categorical",
    "crossentropy",
    "hinge",
    "kl_divergence",
    "kldivergence",
    "focal",
)


def is_classifier(loss: Any, label: Any, output: Any) -> bool:
    """Whether the outputs are scores of classes: by the loss's name, else by the label's shape."""
    if not tf.is_tensor(output) or output.shape.rank != 2:
        return False
    if output.shape[1] == 1:
        return "binary" in _name(loss)
    if any(word in _name(loss) for word in _CLASSIFICATION):
        return True
    return tf.is_tensor(label) and label.dtype.is_integer and label.shape.rank == 1


def _name(loss: Any) -> str:
    if isinstance(loss, str):
        return loss.lower()
    wrapped = getattr(loss, "fn", loss)
    name = getattr(wrapped, "__name__", type(wrapped).__name__)
    return f"{name} {getattr(loss, 'name', '')}".lower()


TARGETS = ("loss", "predicted_loss", "logit", "probability", "margin")


def target_quantity(target: str, loss: Any) -> PerExample:
    """What is differentiated for a test example, as a function like `per_example_loss`.

    Every quantity falls when training on a proponent: the loss itself, and the negative of a
    logit, probability or margin, so that a proponent always pushes towards the class in question.
    That class is the label's, or the predicted one where there is no label.

    Args:
      target: "loss"; "predicted_loss", the loss of the predicted class; "logit", of the class
        (its log-odds where the model gives probabilities); "probability"; "margin", logit of the
        class less the greatest of the others.
    """
    if target == "loss":
        compute = per_example_loss(loss)

        def labelled(label: Any, output: Any, sample_weight: Any) -> tf.Tensor:
            if label is None:
                raise InputError(
                    "parse gives no label: the loss needs one. For test examples without a label "
                    "take --target=predicted_loss, logit, probability or margin."
                )
            return compute(label, output, sample_weight)

        return labelled
    if target not in TARGETS:
        raise InputError(f"--target={target} is not known; take one of {', '.join(TARGETS)}.")
    resolved = keras.losses.get(loss)
    from_logits = bool(
        getattr(resolved, "from_logits", False)
        or getattr(resolved, "_fn_kwargs", {}).get("from_logits", False)
    )
    compute = per_example_loss(loss)

    def quantity(label: Any, output: Any, sample_weight: Any) -> tf.Tensor:
        del sample_weight
        if not is_classifier(loss, label, output):
            raise InputError(f"--target={target} needs a classifier: one output of scores [B, K].")
        scores = tf.cast(output, tf.float32)
        binary = scores.shape[1] == 1
        if binary:
            rival = tf.zeros_like(scores) if from_logits else 1.0 - scores
            scores = tf.concat([rival, scores], axis=1)
        predicted = tf.argmax(scores, axis=1)
        if target == "predicted_loss":
            if label is not None and label.shape.rank == 2 and not binary:
                return compute(tf.one_hot(predicted, scores.shape[1]), output, None)
            if label is None and "sparse" not in _name(loss) and not binary:
                return compute(tf.one_hot(predicted, scores.shape[1]), output, None)
            return compute(predicted[:, None] if binary else predicted, output, None)
        known = labels(label, output, True)
        index = tf.where(tf.math.is_nan(known), predicted, tf.cast(known, tf.int64))
        chosen = tf.one_hot(index, scores.shape[1])
        if from_logits:
            logits, probabilities = scores, tf.nn.softmax(scores)
        else:
            tiny = 1e-7
            clipped = tf.clip_by_value(scores, tiny, 1 - tiny)
            logits, probabilities = tf.math.log(clipped) - tf.math.log1p(-clipped), scores
        if target == "probability":
            return -tf.reduce_sum(chosen * probabilities, axis=1)
        own = tf.reduce_sum(chosen * logits, axis=1)
        if target == "logit":
            return -own
        others = tf.where(chosen > 0, tf.fill(tf.shape(logits), logits.dtype.min), logits)
        return tf.reduce_max(others, axis=1) - own

    return quantity
