"""What kind of model a task has: what its labels and outputs are.

A kind is told by the shapes of label and output and by what the loss does, never by its name:
Keras's own losses are known, and another one is tried on made-up scores. A loss is of classes when
it never rises with the score of the label's class, and never falls with another's.
"""

import contextlib
import dataclasses
import functools
import inspect
from typing import Any, Literal, cast, get_args

import keras
import numpy as np
import tensorflow as tf

from tracin_beam.errors import InputError
from tracin_beam.gradients import losses, nests
from tracin_beam.inputs.task import KINDS

Name = Literal["classification", "multilabel", "regression", "other"]
assert get_args(Name) == KINDS

# Keras's losses by what their outputs are.
_SOFTMAX = {
    keras.losses.categorical_crossentropy,
    keras.losses.sparse_categorical_crossentropy,
    keras.losses.categorical_focal_crossentropy,
    keras.losses.kl_divergence,
    keras.losses.categorical_hinge,
}
_SIGMOID = {keras.losses.binary_crossentropy, keras.losses.binary_focal_crossentropy}
_SIGNED = {keras.losses.hinge, keras.losses.squared_hinge}
_NUMBERS = {
    keras.losses.mean_squared_error,
    keras.losses.mean_absolute_error,
    keras.losses.mean_absolute_percentage_error,
    keras.losses.mean_squared_logarithmic_error,
    keras.losses.cosine_similarity,
    keras.losses.huber,
    keras.losses.log_cosh,
    keras.losses.poisson,
}
_KNOWN = _SOFTMAX | _SIGMOID | _SIGNED | _NUMBERS


@dataclasses.dataclass(frozen=True)
class Kind:
    """What labels and outputs of a task are.

    Attributes:
      name: "classification", one of K classes; "multilabel", any of K; "regression", numbers;
        "other", anything else, of which neither labels nor predictions are shown unless they are
        single numbers.
      single: of a classification: one output for two classes.
      separate: of a classification: each output is a score by itself, not beside the others.
      probabilities: outputs are probabilities, and not logits or other scores.
      signed: labels of the two classes are −1 and 1, as of hinge losses.
      sparse: labels are class numbers, and not one-hot.
    """

    name: Name
    single: bool = False
    separate: bool = False
    probabilities: bool = False
    signed: bool = False
    sparse: bool = True

    @property
    def threshold(self) -> float | None:
        """Above which one output stands for the class 1; None where there is no such output."""
        if self.name != "classification" or not self.single:
            return None
        return 0.5 if self.probabilities else 0.0


def infer(loss: Any, label: Any, output: Any, declared: str | None = None) -> Kind:
    """The kind of a task, from an example's label (or None), the output for it, and the loss.

    Raises:
      InputError: it is declared to be of a kind that its shapes rule out.
    """
    if not tf.is_tensor(output) or output.shape.rank not in (1, 2) or not output.dtype.is_floating:
        if declared in ("classification", "multilabel"):
            shapes = tf.nest.map_structure(lambda x: x.shape.as_list(), output)
            raise InputError(
                f"Task(kind={declared!r}) needs a model with one output of scores, [B, K]; "
                f"this one's output has the shape {shapes}."
            )
        return Kind("regression" if declared == "regression" else "other")
    if tf.is_tensor(label) and label.dtype == tf.string and _function(loss)[0] in _KNOWN:
        raise InputError(
            f"the labels are strings, which {losses.describe(loss)} does not take: let parse turn "
            "them into class numbers, and give their names as Task(label_names=[...])."
        )
    single = output.shape.rank == 1 or output.shape[1] == 1
    if declared == "multilabel" and single:
        raise InputError("Task(kind='multilabel') needs several outputs; this model has one.")
    found = _of_loss(loss, label, output, single)
    if declared is None or declared == found.name:
        return found
    if declared == "classification":
        separate = found.separate or found.name == "multilabel"
        return dataclasses.replace(found, name="classification", single=single, separate=separate)
    return dataclasses.replace(found, name=cast(Name, declared), single=False)


def _of_loss(loss: Any, label: Any, output: tf.Tensor, single: bool) -> Kind:
    function, options = _function(loss)
    labels_rank = label.shape.rank if tf.is_tensor(label) else None
    columns = label.shape[1] if labels_rank == 2 else None
    if labels_rank is None:
        sparse = function is not None and function is keras.losses.sparse_categorical_crossentropy
    else:
        sparse = labels_rank == 1 or columns == 1
    logits = bool(options.get("from_logits", function is not keras.losses.kl_divergence))
    remembered = hasattr(output, "_keras_logits")
    probabilities = remembered or not logits
    if function in _SOFTMAX and not single:
        if function is keras.losses.categorical_hinge:
            probabilities = remembered
        return Kind("classification", probabilities=probabilities, sparse=sparse)
    if function in _SIGMOID | _SIGNED:
        signed = function in _SIGNED
        kind: Name = "classification" if single else "multilabel"
        return Kind(
            kind,
            single=single,
            separate=not single,
            probabilities=remembered if signed else probabilities,
            signed=signed,
            sparse=sparse,
        )
    if function in _NUMBERS:
        return Kind("regression", sparse=sparse)
    with contextlib.suppress(Exception):  # whatever a loss raises on made-up scores
        if single:
            return _tried_single(loss, label, remembered)
        return _tried(loss, label, int(output.shape[1]), remembered, sparse)
    return Kind("regression" if single else "other", sparse=sparse)


def _function(loss: Any) -> tuple[Any, dict[str, Any]]:
    """The function of a loss, and the arguments that it is called with."""
    resolved = keras.losses.get(loss)
    function = getattr(resolved, "fn", resolved)
    options = {**getattr(resolved, "_fn_kwargs", {})}
    while isinstance(function, functools.partial):
        options = {**function.keywords, **options}
        function = function.func
    with contextlib.suppress(TypeError, ValueError):
        for parameter in inspect.signature(function).parameters.values():
            if parameter.default is not parameter.empty:
                options.setdefault(parameter.name, parameter.default)
    try:
        hash(function)
    except TypeError:
        function = None
    return function, options


def _slopes(loss: Any, label: Any, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row's loss, and its gradient; what is not finite is zero."""
    given = tf.constant(scores, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(given)
        values = losses.per_example_loss(loss)(label, given, None)
        total = tf.reduce_sum(values)
    slope = tape.gradient(total, given, unconnected_gradients="zero")
    return values.numpy(), np.nan_to_num(np.asarray(tf.convert_to_tensor(slope)), nan=0.0)


def _tried_single(loss: Any, label: tf.Tensor, remembered: bool) -> Kind:
    """The kind of one output: whether its loss is of the classes 0 and 1, or of a number."""
    shape = [2] if label.shape.rank == 1 else [2, 1]
    classes = tf.reshape(tf.cast([0, 1], label.dtype), shape)

    def slope(zero: float, one: float) -> tuple[float, float]:
        _, found = _slopes(loss, classes, np.array([[zero], [one]], np.float32))
        return float(found[0, 0]), float(found[1, 0])

    for place in (0.1, 0.5, 0.9):
        zero, one = slope(place, place)
        if not zero > 1e-6 or not one < -1e-6:
            return Kind("regression")
    # A number may be too large for the label 1, and too small for 0.
    zero, one = slope(-3.0, 3.0)
    if zero < -1e-6 or one > 1e-6:
        return Kind("regression")
    zero, one = slope(3.0, -3.0)
    logits = zero > 1e-6 and one < -1e-6
    return Kind("classification", single=True, probabilities=remembered or not logits)


def _tried(loss: Any, label: tf.Tensor, classes: int, remembered: bool, sparse: bool) -> Kind:
    """The kind of several outputs: whether their loss is of the classes that the labels name."""
    neither: Name = "other" if sparse else "regression"
    if not sparse and label.shape[1] != classes:
        return Kind("other", sparse=sparse)
    count = min(classes, 8)
    own = np.eye(classes, dtype=bool)[:count]
    if sparse:
        given = tf.reshape(tf.cast(tf.range(count), label.dtype), [count, *label.shape[1:]])
    else:
        given = tf.cast(own, label.dtype)
    scores = np.random.default_rng(0).uniform(0.5, 1.5, (count, classes))
    scores /= scores.sum(axis=1, keepdims=True)
    value, slopes = _slopes(loss, given, scores)
    _, far = _slopes(loss, given, np.where(own, 3.0, scores))
    of_classes = (
        np.all(slopes[own] < -1e-6)
        and np.all(slopes[~own] > -1e-6)
        and np.all(far[own] < 1e-6)
        and np.all(far[~own] > -1e-6)
    )
    if not of_classes:
        return Kind(neither, sparse=sparse)
    _, other = _slopes(loss, given, np.where(own, 0.8 * scores, scores))
    moved = np.abs(other - slopes)[~own].max()
    separate = bool(moved < 1e-6 and np.abs(slopes[~own]).max() > 1e-6)
    if separate:
        _, above = _slopes(loss, given, np.where(own, scores, 3.0))
        logits = bool(np.all(above[~own] > 1e-6))
    else:
        shifted, _ = _slopes(loss, given, scores + 1.0)
        logits = bool(np.allclose(shifted, value, rtol=1e-3))
    name: Name = "multilabel" if separate and not sparse else "classification"
    return Kind(name, separate=separate, probabilities=remembered or not logits, sparse=sparse)


def predictions(output: Any, kind: Kind) -> tf.Tensor:
    """What the model says of each example, as a number: float32 [B], NaN where it is not one.

    The class for a classification with scores [B, K > 1], the value itself for [B] and [B, 1].
    """
    if tf.is_tensor(output):
        output = tf.cast(output, tf.float32)
        if output.shape.rank == 1:
            return output
        if output.shape.rank == 2 and output.shape[1] == 1:
            return output[:, 0]
        if kind.name == "classification":
            return tf.cast(tf.argmax(output, axis=1), tf.float32)
    return _unknown(output)


def labels(label: Any, output: Any, kind: Kind) -> tf.Tensor:
    """The label as a number: float32 [B], NaN where it is not one.

    For a classification it is the class, also of one-hot labels and distributions over the
    classes: the one that has most, if only one has. A class below zero
    stands for no label, but for −1 of a hinge loss, which is the class 0. The labels of a
    multilabel task are no number.
    """
    if tf.is_tensor(label) and label.dtype != tf.string and kind.name != "multilabel":
        label = tf.cast(label, tf.float32)
        if label.shape.rank == 2 and label.shape[1] == 1:
            label = label[:, 0]
        if label.shape.rank == 1:
            if kind.signed:
                label = tf.maximum(label, 0.0)
            missing = tf.logical_and(label < 0, kind.name == "classification")
            return tf.where(missing, float("nan"), label)
        if label.shape.rank == 2 and kind.name == "classification":
            most = tf.reduce_max(label, axis=1, keepdims=True)
            only = tf.reduce_sum(tf.cast(label == most, tf.int32), axis=1) == 1
            known = tf.logical_and(only, most[:, 0] > 0)
            return tf.where(known, tf.cast(tf.argmax(label, axis=1), tf.float32), float("nan"))
    return _unknown(output)


def _unknown(output: Any) -> tf.Tensor:
    return tf.fill([tf.shape(nests.present(output)[0])[0]], float("nan"))
