"""Per-example losses and what else of an example may be differentiated.

An example's loss ℓ(z) is what Keras computes for a batch of z alone: whatever the reduction of
the loss, the masks and the sample weights, it never depends on what shares the batch.
"""

import contextlib
import functools
import inspect
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
            "For a model with several outputs write a function of (labels, outputs)."
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
    """The label as a number: float32 [B], NaN where it is not one.

    One-hot labels give the class. A class below zero stands for no label.
    """
    if tf.is_tensor(label) and label.dtype != tf.string:
        label = tf.cast(label, tf.float32)
        if label.shape.rank == 2 and label.shape[1] == 1:
            label = label[:, 0]
        if label.shape.rank == 1:
            return tf.where(label < 0, float("nan"), label) if classifier else label
        if label.shape.rank == 2 and classifier:
            return tf.cast(tf.argmax(label, axis=1), tf.float32)
    batch = tf.shape(tf.nest.flatten(output)[0])[0]
    return tf.fill([batch], float("nan"))


def loss_if_labelled(loss: Any) -> PerExample:
    """Like `per_example_loss` for a classifier, but NaN for examples without a label."""
    compute = per_example_loss(loss)

    def known(label: Any, output: Any, sample_weight: Any) -> tf.Tensor:
        if label is None:
            return tf.fill([tf.shape(output)[0]], float("nan"))
        missing = tf.math.is_nan(labels(label, output, True))
        # Some losses fail on a class that there is not.
        none = missing if label.shape.rank == 1 else missing[:, None]
        value = compute(tf.where(none, tf.zeros_like(label), label), output, sample_weight)
        return tf.where(missing, float("nan"), value)

    return known


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
        (its log-odds where the model gives probabilities, or has one output for two classes);
        "probability"; "margin", logit of the class less the greatest of the others.
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
    compute = per_example_loss(loss)

    def quantity(label: Any, output: Any, sample_weight: Any) -> tf.Tensor:
        del sample_weight
        if not is_classifier(loss, label, output):
            raise InputError(f"--target={target} needs a classifier: one output of scores [B, K].")
        probabilities = _gives_probabilities(loss, output)
        separate = output.shape[1] == 1 or "binary" in _name(loss)  # sigmoids, no softmax
        scores = _log_scores(output, probabilities, separate)
        binary = scores.shape[1] == 1
        if binary:
            scores = tf.concat([-scores, scores], axis=1)
        predicted = tf.argmax(scores, axis=1)
        if target == "predicted_loss":
            if binary:
                return compute(predicted[:, None], output, None)
            one_hot = "sparse" not in _name(loss) if label is None else label.shape.rank == 2
            classes = tf.one_hot(predicted, scores.shape[1]) if one_hot else predicted
            return compute(classes, output, None)
        known = labels(label, output, True)
        index = tf.where(tf.math.is_nan(known), predicted, tf.cast(known, tf.int64))
        chosen = tf.one_hot(index, scores.shape[1], on_value=True, off_value=False)
        own = tf.reduce_sum(tf.where(chosen, scores, 0.0), axis=1)
        if target == "probability":
            if separate:
                return -tf.sigmoid(own)
            return -tf.reduce_sum(tf.where(chosen, tf.nn.softmax(scores), 0.0), axis=1)
        others = tf.where(chosen, scores.dtype.min, scores)
        if target == "margin" and not binary:
            return tf.reduce_max(others, axis=1) - own
        if probabilities and not separate:
            return tf.reduce_logsumexp(others, axis=1) - own
        return -own

    return quantity


def _gives_probabilities(loss: Any, output: Any) -> bool:
    if hasattr(output, "_keras_logits"):
        return True
    resolved = keras.losses.get(loss)
    options = {**getattr(resolved, "_fn_kwargs", {}), **vars(resolved)}
    if "from_logits" not in options:
        with contextlib.suppress(TypeError, ValueError):
            function = getattr(resolved, "fn", resolved)
            for parameter in inspect.signature(function).parameters.values():
                options.setdefault(parameter.name, parameter.default)
    if "from_logits" in options:
        return not options["from_logits"]
    return "kl" in _name(loss)


def _log_scores(output: tf.Tensor, probabilities: bool, separate: bool) -> tf.Tensor:
    """Logits; of a model that gives probabilities their log-odds if separate, else their logs.

    A probability near one has lost the digits that tell how near it is: where Keras knows the
    logits that it was made from, they are taken (their softmax is the same, which is enough).
    """
    logits = getattr(output, "_keras_logits", None if probabilities else output)
    if logits is not None:
        return tf.cast(logits, tf.float32)
    given = tf.cast(output, tf.float32)
    if not separate:
        return tf.math.log(tf.maximum(given, 1e-30))
    clipped = tf.clip_by_value(given, 1e-7, 1 - 1e-7)
    return tf.math.log(clipped) - tf.math.log1p(-clipped)
