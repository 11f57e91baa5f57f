"""What kind of task a loss, a label and an output make, and what is shown of them."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from tracin_beam.errors import InputError
from tracin_beam.gradients import kinds
from tracin_beam.gradients.kinds import Kind

B, T, K = 5, 4, 3
rng = np.random.default_rng(0)
LOGITS = rng.normal(size=(B, K)).astype("float32")
CLASSES = rng.integers(0, K, B)
ONE_HOT = np.eye(K, dtype="float32")[CLASSES]
MULTI_HOT = np.array([[0, 0, 0], [1, 1, 0], [0, 1, 0], [1, 1, 1], [0, 0, 1]], np.float32)
VALUES = rng.normal(size=B).astype("float32")
BY_POSITION = rng.normal(size=(B, T, K)).astype("float32")
CLASSES_BY_POSITION = rng.integers(0, K, (B, T))
SCE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
BCE = keras.losses.BinaryCrossentropy(from_logits=True)
ops = keras.ops


def tensor(x):
    return None if x is None else tf.nest.map_structure(tf.constant, x)


def kl_annealed_mse(y, p):  # a name that holds others
    return ops.mean(ops.square(y - p), axis=-1)


def binary_classifier_crossentropy_regression(y, p):
    return ops.abs(y - p[:, 0])


def own_softmax(y, p):
    return -tf.reduce_sum(y * tf.nn.log_softmax(p), axis=-1)


def own_sparse_probabilities(y, p):
    chosen = tf.one_hot(tf.cast(tf.reshape(y, [-1]), tf.int32), p.shape[1])
    return -tf.math.log(tf.reduce_sum(chosen * p, axis=1))


def own_sigmoids(y, p):
    return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(y, p), axis=-1)


def own_binary_probability(y, p):
    y = tf.cast(tf.reshape(y, [-1]), tf.float32)
    return -(y * tf.math.log(p[:, 0]) + (1 - y) * tf.math.log(1 - p[:, 0]))


def norm_of_embedding(y, p):
    return tf.reduce_sum(tf.square(p), axis=1) * tf.cast(1 + y, tf.float32)


def own_center_loss(y, p):
    centers = tf.reshape(tf.linspace(-1.0, 1.0, 30), [10, 3])
    return tf.reduce_sum(tf.square(p - tf.gather(centers, tf.cast(y, tf.int32))), axis=1)


@pytest.mark.parametrize(
    ("loss", "label", "output", "expected"),
    [
        (SCE, CLASSES, LOGITS, Kind("classification")),
        (SCE, CLASSES.astype("float32"), LOGITS, Kind("classification")),
        (SCE, CLASSES[:, None], LOGITS, Kind("classification")),
        (SCE, None, LOGITS, Kind("classification")),
        ("categorical_crossentropy", ONE_HOT, LOGITS,
         Kind("classification", probabilities=True, sparse=False)),
        ("categorical_hinge", ONE_HOT, LOGITS, Kind("classification", sparse=False)),
        (keras.losses.kl_divergence, ONE_HOT, LOGITS,
         Kind("classification", probabilities=True, sparse=False)),
        (functools.partial(keras.losses.categorical_crossentropy, from_logits=True), ONE_HOT,
         LOGITS, Kind("classification", sparse=False)),
        (own_softmax, ONE_HOT, LOGITS, Kind("classification", sparse=False)),
        (own_sparse_probabilities, CLASSES, LOGITS, Kind("classification", probabilities=True)),
        (lambda y, p: SCE(y, p), CLASSES, LOGITS, Kind("classification")),
        (BCE, CLASSES % 2, LOGITS[:, :1], Kind("classification", single=True)),
        (BCE, CLASSES % 2, LOGITS[:, 0], Kind("classification", single=True)),
        ("binary_crossentropy", VALUES, LOGITS[:, :1],
         Kind("classification", single=True, probabilities=True)),
        ("hinge", 2 * (CLASSES % 2) - 1, LOGITS[:, :1],
         Kind("classification", single=True, signed=True)),
        (own_binary_probability, CLASSES % 2, LOGITS[:, :1],
         Kind("classification", single=True, probabilities=True)),
        (lambda y, p: BCE(y, p), CLASSES % 2, LOGITS[:, :1], Kind("classification", single=True)),
        ("binary_crossentropy", MULTI_HOT, LOGITS,
         Kind("multilabel", separate=True, probabilities=True, sparse=False)),
        (own_sigmoids, MULTI_HOT, LOGITS, Kind("multilabel", separate=True, sparse=False)),
        ("mse", VALUES, LOGITS[:, :1], Kind("regression")),
        ("mse", CLASSES, LOGITS[:, :1], Kind("regression")),
        ("poisson", CLASSES, LOGITS[:, :1], Kind("regression")),
        ("mse", ONE_HOT, LOGITS, Kind("regression", sparse=False)),
        (kl_annealed_mse, ONE_HOT, LOGITS, Kind("regression", sparse=False)),
        (binary_classifier_crossentropy_regression, VALUES, LOGITS[:, :1], Kind("regression")),
        (lambda y, p: tf.square(tf.cast(y, tf.float32) - p), CLASSES, LOGITS[:, :1],
         Kind("regression")),
        (norm_of_embedding, CLASSES, LOGITS, Kind("other")),
        (own_center_loss, CLASSES, LOGITS, Kind("other")),
        (SCE, CLASSES_BY_POSITION, BY_POSITION, Kind("other")),
        (SCE, CLASSES, {"a": LOGITS}, Kind("other")),
        (lambda y, p: tf.reduce_sum(p, axis=1), np.array(["a"] * B), LOGITS, Kind("other")),
    ],
)  # fmt: skip
def test_kinds_by_shapes_and_by_what_the_loss_does(loss, label, output, expected):
    assert kinds.infer(loss, tensor(label), tensor(output)) == expected


def test_outputs_that_keras_knows_the_logits_of_are_probabilities():
    output = keras.activations.sigmoid(tf.constant(LOGITS[:, :1]))
    found = kinds.infer(lambda y, p: BCE(y, p), tensor(CLASSES % 2), output)
    assert found == Kind("classification", single=True, probabilities=True)
    assert found.threshold == 0.5
    assert kinds.infer(BCE, tensor(CLASSES % 2), tensor(LOGITS[:, :1])).threshold == 0
    assert kinds.infer(SCE, tensor(CLASSES), tensor(LOGITS)).threshold is None


def test_kinds_that_are_declared():
    def infer(loss, label, output, kind):
        return kinds.infer(loss, tensor(label), tensor(output), kind)

    found = infer(BCE, ONE_HOT, LOGITS, "classification")
    assert found == Kind("classification", separate=True, sparse=False)
    assert infer(norm_of_embedding, CLASSES, LOGITS, "classification").name == "classification"
    assert infer("mse", CLASSES % 2, LOGITS[:, :1], "classification").single
    assert infer(SCE, CLASSES, LOGITS, "other").name == "other"
    with pytest.raises(InputError, match=r"one output of scores, \[B, K\]"):
        infer(SCE, CLASSES_BY_POSITION, BY_POSITION, "classification")
    with pytest.raises(InputError, match="labels are strings"):
        infer(SCE, np.array(["a"] * B), LOGITS, None)
    with pytest.raises(InputError, match="needs several outputs"):
        infer(BCE, CLASSES, LOGITS[:, :1], "multilabel")


def test_predictions_and_labels():
    def check(got, expected):
        assert got.dtype == tf.float32
        np.testing.assert_array_equal(got, expected)

    classes, numbers, other = (Kind(n) for n in ("classification", "regression", "other"))
    several = Kind("multilabel")
    nothing = np.full(B, np.nan)
    output, label = tensor(LOGITS), tensor(CLASSES)
    check(kinds.predictions(output, classes), LOGITS.argmax(1))
    check(kinds.predictions(output, other), nothing)
    check(kinds.predictions(output, several), nothing)
    check(kinds.predictions(output[:, :1], numbers), LOGITS[:, 0])
    check(kinds.predictions(output[:, 0], numbers), LOGITS[:, 0])
    check(kinds.predictions(tensor(BY_POSITION), other), nothing)
    check(kinds.predictions({"a": output}, other), nothing)
    check(kinds.labels(label, output, classes), CLASSES)
    check(kinds.labels(label[:, None], output, classes), CLASSES)
    check(kinds.labels(tensor(ONE_HOT), output, classes), CLASSES)
    check(kinds.labels(tensor(0.9 * ONE_HOT + 0.03), output, classes), CLASSES)
    check(kinds.labels(tensor(MULTI_HOT), output, classes), [np.nan, np.nan, 1, np.nan, 2])
    check(kinds.labels(tensor(MULTI_HOT), output, several), nothing)
    check(kinds.labels(tensor(ONE_HOT), output, other), nothing)
    check(kinds.labels(tensor(VALUES), output[:, 0], numbers), VALUES)
    check(kinds.labels(None, output, classes), nothing)
    check(kinds.labels(tf.constant(["a"] * B), output, classes), nothing)
    check(kinds.labels(tensor(CLASSES_BY_POSITION), tensor(BY_POSITION), other), nothing)
    missing = np.where(np.arange(B) == 2, -1, CLASSES)
    expected = np.where(missing < 0, np.nan, missing)
    check(kinds.labels(tensor(missing), output, classes), expected)
    check(kinds.labels(tensor(missing), output, numbers), missing)
    signed = Kind("classification", single=True, signed=True)
    check(kinds.labels(tf.constant([-1, 1, 0, 1, -1]), output, signed), [0, 1, 0, 1, 0])
