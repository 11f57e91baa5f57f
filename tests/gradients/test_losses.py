"""Per-example losses against Keras on a batch of one, and targets against NumPy."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tracin_beam.errors import InputError
from tracin_beam.gradients import losses

B, T, K = 5, 4, 3
rng = np.random.default_rng(0)
LOGITS = rng.normal(size=(B, K)).astype("float32")
CLASSES = rng.integers(0, K, B)
ONE_HOT = np.eye(K, dtype="float32")[CLASSES]
VALUES = rng.normal(size=B).astype("float32")
BY_POSITION = rng.normal(size=(B, T, K)).astype("float32")
CLASSES_BY_POSITION = rng.integers(0, K, (B, T))
MASK = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 1]], bool)
WEIGHTS = rng.random(B).astype("float32") + 0.1
WEIGHTS_BY_POSITION = rng.random((B, T)).astype("float32") + 0.1
REDUCTIONS = ["sum_over_batch_size", "mean", "sum", "none", None, "mean_with_sample_weight"]


def tensors(structure, slices=slice(None), mask=None):
    made = tf.nest.map_structure(lambda x: tf.constant(np.asarray(x)[slices]), structure)
    if mask is not None:
        made._keras_mask = tf.constant(mask[slices])
    return made


def by_keras(loss, label, output, weight=None, mask=None):
    """The Keras loss of each example as a batch of one."""
    loss = keras.losses.get(loss)
    if not isinstance(loss, keras.losses.Loss):
        loss = keras.src.losses.losses.LossFunctionWrapper(loss)
    found = []
    for i in range(B):
        one = slice(i, i + 1)
        arguments = {} if weight is None else {"sample_weight": tensors(weight, one)}
        value = loss(tensors(label, one), tensors(output, one, mask), **arguments)
        found.append(float(tf.reduce_sum(value)))
    return found


def compare(loss, label, output, weight=None, mask=None):
    compute = losses.per_example_loss(loss)

    def run():
        given = None if weight is None else tensors(weight)
        return compute(tensors(label), tensors(output, mask=mask), given)

    for got in (run(), tf.function(run, autograph=False)()):
        assert got.shape == (B,)
        assert got.dtype == tf.float32
        np.testing.assert_allclose(got, by_keras(loss, label, output, weight, mask), 1e-5, 1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weight", [None, WEIGHTS, WEIGHTS[:, None]])
@pytest.mark.parametrize("mask", [None, MASK[:, 1]])
def test_one_value_for_each_example(reduction, weight, mask):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
    compare(loss, CLASSES, LOGITS, weight, mask)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weight", [None, WEIGHTS, WEIGHTS[:, None], WEIGHTS_BY_POSITION])
@pytest.mark.parametrize("mask", [None, MASK])
def test_a_value_for_each_position(reduction, weight, mask):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
    compare(loss, CLASSES_BY_POSITION, BY_POSITION, weight, mask)


@pytest.mark.parametrize("mask", [None, MASK])
def test_ignored_class(mask):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=1)
    compare(loss, CLASSES_BY_POSITION, BY_POSITION, None, mask)


@pytest.mark.parametrize(
    ("loss", "label", "output"),
    [
        ("mse", VALUES, LOGITS[:, :1]),
        ("mse", VALUES[:, None], LOGITS[:, :1]),
        ("mse", VALUES, LOGITS[:, 0]),
        ("mse", VALUES[:, None], LOGITS[:, 0]),
        ("mae", LOGITS, LOGITS[::-1]),
        ("huber", BY_POSITION, BY_POSITION[::-1]),
        ("categorical_crossentropy", ONE_HOT, keras.ops.softmax(LOGITS).numpy()),
        ("sparse_categorical_crossentropy", CLASSES, keras.ops.softmax(LOGITS).numpy()),
        ("binary_crossentropy", CLASSES % 2, keras.ops.sigmoid(LOGITS[:, :1]).numpy()),
        ("binary_crossentropy", ONE_HOT, keras.ops.sigmoid(LOGITS).numpy()),
        ("hinge", CLASSES % 2, LOGITS[:, :1]),
        ("categorical_hinge", ONE_HOT, LOGITS),
        ("kl_divergence", ONE_HOT, keras.ops.softmax(LOGITS).numpy()),
        (keras.losses.BinaryCrossentropy(from_logits=True), CLASSES % 2, LOGITS[:, :1]),
        (keras.losses.BinaryCrossentropy(from_logits=True), (CLASSES % 2)[:, None], LOGITS[:, :1]),
        (keras.losses.BinaryCrossentropy(label_smoothing=0.1, from_logits=True), ONE_HOT, LOGITS),
        (keras.losses.CategoricalFocalCrossentropy(from_logits=True), ONE_HOT, LOGITS),
        (keras.losses.CosineSimilarity(axis=-1), BY_POSITION, BY_POSITION[::-1]),
        (keras.losses.mean_squared_error, VALUES, LOGITS[:, :1]),
        (keras.losses.MeanSquaredError, VALUES, LOGITS[:, :1]),
        (keras.losses.MeanSquaredError(dtype="float64"), VALUES, LOGITS[:, :1]),
        (lambda y, p: tf.square(y - p), VALUES, LOGITS[:, :1]),
        (lambda y, p: tf.square(y - p), BY_POSITION, BY_POSITION[::-1]),
    ],
)
@pytest.mark.parametrize("weight", [None, WEIGHTS])
def test_losses_by_name_object_and_function(loss, label, output, weight):
    compare(loss, label, output, weight)


class Squared(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return tf.reduce_sum(tf.square(y_true - y_pred), axis=-1)


class ScalarLoss(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return tf.reduce_mean(tf.square(y_true - y_pred))


class OwnCall(keras.losses.Loss):
    def __call__(self, y_true, y_pred, sample_weight=None):
        value = tf.reduce_mean(tf.square(y_true - y_pred))
        mask = getattr(y_pred, "_keras_mask", None)
        if mask is not None:
            value *= tf.reduce_sum(tf.cast(mask, tf.float32))
        return value if sample_weight is None else value * tf.reduce_sum(sample_weight)


@pytest.mark.parametrize("loss", [Squared(), Squared(reduction="sum"), ScalarLoss(), OwnCall()])
@pytest.mark.parametrize("weight", [None, WEIGHTS])
@pytest.mark.parametrize("mask", [None, MASK[:, 0]])
def test_subclasses_of_loss(loss, weight, mask):
    compare(loss, LOGITS, LOGITS[::-1], weight, mask)


def test_mask_by_position_on_a_loss_by_example():
    compare(Squared(), BY_POSITION[:, :, 0], BY_POSITION[:, :, 1], None, MASK)


@pytest.mark.parametrize(
    "loss",
    [
        lambda y, p: tf.reduce_mean(tf.square(y - p)),
        lambda y, p: tf.reduce_mean(tf.square(y - p), axis=0),
        lambda y, p: tf.reshape(tf.square(y - p), [-1]),
    ],
)
@pytest.mark.parametrize("weight", [None, WEIGHTS])
def test_functions_that_do_not_give_a_value_for_each_example(loss, weight):
    compare(loss, LOGITS, LOGITS[::-1], weight)


def test_logits_that_keras_remembers_reach_a_scalar_loss():
    sure = tf.constant([[60.0, 0, 0], [0, 60, 0], [0, 0, 60], [1, 2, 3], [0, 0, 0]])

    def scalar(y, p):
        return tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(y, p))

    @tf.function(autograph=False)
    def run(loss):
        output = keras.activations.softmax(sure)
        return losses.per_example_loss(loss)(tf.constant(CLASSES), output, None)

    expected = keras.losses.sparse_categorical_crossentropy(CLASSES, sure, from_logits=True)
    np.testing.assert_allclose(run("sparse_categorical_crossentropy"), expected, 1e-5)
    np.testing.assert_allclose(run(scalar), expected, 1e-5)


def test_function_of_several_outputs():
    label = {"class": tf.constant(CLASSES), "value": tf.constant(VALUES)}
    output = {"class": tf.constant(LOGITS), "value": tf.constant(LOGITS[:, :1])}

    def by_example(y, p):
        classes = keras.losses.sparse_categorical_crossentropy(y["class"], p["class"], True)
        return classes + tf.square(y["value"] - p["value"][:, 0])

    first = keras.losses.sparse_categorical_crossentropy(CLASSES, LOGITS, True).numpy()
    expected = first + (VALUES - LOGITS[:, 0]) ** 2
    compute = losses.per_example_loss(by_example)
    np.testing.assert_allclose(compute(label, output, None), expected, 1e-5)
    weighted = compute(label, output, tf.constant(WEIGHTS))
    np.testing.assert_allclose(weighted, expected * WEIGHTS, 1e-5)
    scalar = losses.per_example_loss(lambda y, p: tf.reduce_mean(by_example(y, p)))
    np.testing.assert_allclose(scalar(label, output, None), expected, 1e-5)
    weighted = scalar(label, output, tf.constant(WEIGHTS))
    np.testing.assert_allclose(weighted, expected * WEIGHTS, 1e-5)
    one_label = losses.per_example_loss(lambda y, p: by_example({**label, "class": y}, p))
    np.testing.assert_allclose(one_label(label["class"], output, None), expected, 1e-5)


def test_half_precision_outputs_are_computed_in_float32():
    output = tf.cast(LOGITS, tf.float16)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    got = losses.per_example_loss(loss)(tf.constant(CLASSES), output, None)
    expected = by_keras(loss, CLASSES, np.float32(output))
    np.testing.assert_allclose(got, expected, 1e-5)


@pytest.mark.parametrize("loss", [None, "no_such_loss", 3, {"a": "mse"}, ["mse", "mse"]])
def test_what_is_no_loss(loss):
    with pytest.raises(InputError, match="Task\\(loss="):
        losses.per_example_loss(loss)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weights_of_zero_and_below(reduction, smoothing):
    loss = keras.losses.CategoricalCrossentropy(
        from_logits=True, label_smoothing=smoothing, reduction=reduction
    )
    compare(loss, ONE_HOT, LOGITS, np.array([0, -1, 2, 0, -0.5], np.float32))
    by_position = np.float32(WEIGHTS_BY_POSITION * [0, -1, 1, 2])
    one_hot = np.eye(K, dtype="float32")[CLASSES_BY_POSITION]
    compare(loss, one_hot, BY_POSITION, by_position)


def test_class_numbers_as_floats_and_ignored_ones():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    classes = np.where(np.arange(B) == 2, -1, CLASSES).astype("float32")
    compare(loss, classes, LOGITS)
    compare(loss, classes[:, None], LOGITS)
