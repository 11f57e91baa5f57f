"""Per-example losses against Keras on a batch of one, and targets against NumPy."""

import functools

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


# Predictions, labels, and whether a model is a classifier.

SCE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
BCE = keras.losses.BinaryCrossentropy(from_logits=True)


@pytest.mark.parametrize(
    ("loss", "label", "output", "expected"),
    [
        (SCE, CLASSES, LOGITS, True),
        (SCE, None, LOGITS, True),
        ("categorical_crossentropy", ONE_HOT, LOGITS, True),
        ("categorical_hinge", ONE_HOT, LOGITS, True),
        (keras.losses.kl_divergence, ONE_HOT, LOGITS, True),
        (lambda y, p: y, CLASSES, LOGITS, True),
        (lambda y, p: y, VALUES, LOGITS, False),
        (BCE, CLASSES % 2, LOGITS[:, :1], True),
        ("mse", VALUES, LOGITS[:, :1], False),
        ("mse", LOGITS, LOGITS, False),
        (SCE, CLASSES_BY_POSITION, BY_POSITION, False),
        (SCE, CLASSES, {"a": LOGITS}, False),
    ],
)
def test_is_classifier(loss, label, output, expected):
    label = None if label is None else tensors(label)
    assert losses.is_classifier(loss, label, tensors(output)) is expected


def test_predictions_and_labels():
    def check(got, expected):
        assert got.dtype == tf.float32
        np.testing.assert_array_equal(got, expected)

    nothing = np.full(B, np.nan)
    output, label = tensors(LOGITS), tensors(CLASSES)
    check(losses.predictions(output, label, True), LOGITS.argmax(1))
    check(losses.predictions(output, label, False), nothing)
    check(losses.predictions(output[:, :1], label, False), LOGITS[:, 0])
    check(losses.predictions(output[:, 0], label, False), LOGITS[:, 0])
    check(losses.predictions(tensors(BY_POSITION), label, False), nothing)
    check(losses.predictions({"a": output}, label, False), nothing)
    check(losses.labels(label, output, True), CLASSES)
    check(losses.labels(label[:, None], output, True), CLASSES)
    check(losses.labels(tensors(ONE_HOT), output, True), CLASSES)
    check(losses.labels(tensors(ONE_HOT), output, False), nothing)
    check(losses.labels(tensors(VALUES), output[:, 0], False), VALUES)
    check(losses.labels(None, output, True), nothing)
    check(losses.labels(tf.constant(["a"] * B), output, True), nothing)
    check(losses.labels(tensors(CLASSES_BY_POSITION), tensors(BY_POSITION), False), nothing)


# Targets.


def softmax(x):
    e = np.exp(np.float64(x) - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def of(x, classes):
    return np.float64(x)[np.arange(B), classes]


def margin(x, classes):
    others = np.where(np.eye(K, dtype=bool)[classes], -np.inf, np.float64(x))
    return of(x, classes) - others.max(axis=1)


def target(name, loss, label, output):
    label = None if label is None else tensors(label)
    weight = tensors(WEIGHTS)
    return losses.target_quantity(name, loss)(label, output, weight)


@pytest.mark.parametrize("labelled", ["sparse", "one-hot", "without"])
def test_targets_of_logits(labelled):
    label = {"sparse": CLASSES, "one-hot": ONE_HOT, "without": None}[labelled]
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    if labelled == "sparse":
        loss = SCE
    classes = LOGITS.argmax(1) if label is None else CLASSES
    output = tensors(LOGITS)
    np.testing.assert_allclose(target("logit", loss, label, output), -of(LOGITS, classes), 1e-5)
    np.testing.assert_allclose(
        target("probability", loss, label, output), -of(softmax(LOGITS), classes), 1e-5
    )
    np.testing.assert_allclose(
        target("margin", loss, label, output), -margin(LOGITS, classes), 1e-4
    )
    predicted = -np.log(of(softmax(LOGITS), LOGITS.argmax(1)))
    np.testing.assert_allclose(target("predicted_loss", loss, label, output), predicted, 1e-4)


@pytest.mark.parametrize("loss", [SCE, "sparse_categorical_crossentropy"])
def test_predicted_loss_without_labels_of_a_sparse_loss(loss):
    output = tensors(LOGITS) if loss is SCE else tf.nn.softmax(LOGITS)
    predicted = -np.log(of(softmax(LOGITS), LOGITS.argmax(1)))
    np.testing.assert_allclose(target("predicted_loss", loss, None, output), predicted, 1e-4)


@pytest.mark.parametrize("remembered", [False, True])
def test_targets_of_probabilities(remembered):
    probabilities = softmax(LOGITS)
    output = keras.activations.softmax(tensors(LOGITS))
    if remembered:
        output._keras_logits = tensors(LOGITS)
    else:
        output = tf.constant(output.numpy())
    loss = "sparse_categorical_crossentropy"
    p = of(probabilities, CLASSES)
    got = target("logit", loss, CLASSES, output)
    np.testing.assert_allclose(got, -np.log(p / (1 - p)), 1e-4, 1e-5)
    np.testing.assert_allclose(target("probability", loss, CLASSES, output), -p, 1e-5)
    got = target("margin", loss, CLASSES, output)
    np.testing.assert_allclose(got, -margin(LOGITS, CLASSES), 1e-4, 1e-5)


@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("shape", [[B], [B, 1]])
def test_targets_of_one_output_for_two_classes(from_logits, shape):
    logits = LOGITS[:, :1]
    output = tensors(logits) if from_logits else tf.sigmoid(logits)
    loss = keras.losses.BinaryCrossentropy(from_logits=from_logits)
    classes = (CLASSES % 2).reshape(shape)
    signed = logits[:, 0] * np.where(CLASSES % 2, 1, -1)
    chance = 1 / (1 + np.exp(-signed))
    np.testing.assert_allclose(target("logit", loss, classes, output), -signed, 1e-4, 1e-5)
    np.testing.assert_allclose(target("margin", loss, classes, output), -signed, 1e-4, 1e-5)
    np.testing.assert_allclose(target("probability", loss, classes, output), -chance, 1e-4)
    predicted = np.log1p(np.exp(-np.abs(logits[:, 0])))
    for label in (classes, None):
        got = target("predicted_loss", loss, label, output)
        np.testing.assert_allclose(got, predicted, 1e-4)
    got = target("logit", loss, None, output)
    np.testing.assert_allclose(got, -np.abs(logits[:, 0]), 1e-4)


def test_sure_predictions_keep_their_gradient():
    sure = tf.constant([[30.0, 0, 0], [0, 40, 0], [0, 0, 60], [1, 2, 3], [0, 0, 50]])

    @tf.function(autograph=False)
    def gradient(name):
        with tf.GradientTape() as tape:
            tape.watch(sure)
            output = keras.activations.softmax(sure)
            value = target(name, "sparse_categorical_crossentropy", CLASSES, output)
        return tape.gradient(value, sure)

    for name in ("logit", "margin"):
        got = gradient(name).numpy()
        np.testing.assert_allclose(of(got, CLASSES), -1, 1e-5)
        np.testing.assert_allclose(got.sum(axis=1), 0, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "probabilities"),
    [
        (SCE, False),
        ("sparse_categorical_crossentropy", True),
        (keras.losses.SparseCategoricalCrossentropy(), True),
        (functools.partial(keras.losses.categorical_crossentropy, from_logits=True), False),
        (keras.losses.categorical_crossentropy, True),
        ("categorical_hinge", False),
        ("kl_divergence", True),
        (lambda y, p: keras.losses.categorical_crossentropy(y, p, from_logits=True), False),
    ],
)
def test_whether_outputs_are_probabilities(loss, probabilities):
    output = tf.nn.softmax(LOGITS)
    got = (
        target("probability", loss, CLASSES if loss is SCE else ONE_HOT, output)
        if (losses.is_classifier(loss, tensors(ONE_HOT), output))
        else target("probability", loss, CLASSES, output)
    )
    p = softmax(LOGITS) if probabilities else softmax(softmax(LOGITS))
    np.testing.assert_allclose(got, -of(p, CLASSES), 1e-5)


@pytest.mark.parametrize("name", losses.TARGETS)
def test_a_step_down_the_gradient_pushes_towards_the_class(name):
    logits = tf.constant(LOGITS)
    label = LOGITS.argmax(1)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        value = losses.target_quantity(name, SCE)(tf.constant(label), logits, None)
    step = logits - 0.1 * tape.gradient(value, logits)
    assert np.all(of(softmax(step.numpy()), label) > of(softmax(LOGITS), label))


def test_target_loss_is_the_loss_with_its_weights():
    got = target("loss", SCE, CLASSES, tensors(LOGITS))
    np.testing.assert_allclose(got, by_keras(SCE, CLASSES, LOGITS, WEIGHTS), 1e-5)


def test_targets_that_cannot_be():
    output = tensors(LOGITS)
    with pytest.raises(InputError, match="parse gives no label"):
        target("loss", SCE, None, output)
    with pytest.raises(InputError, match="--target=best is not known"):
        losses.target_quantity("best", SCE)
    for name in losses.TARGETS[1:]:
        with pytest.raises(InputError, match=f"--target={name} needs a classifier"):
            target(name, "mse", VALUES, output[:, :1])
