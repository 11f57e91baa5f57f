"""Targets of every kind of task, against NumPy."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from tracin_beam.errors import InputError
from tracin_beam.gradients import kinds, quantities, targets

B, K = 5, 3
rng = np.random.default_rng(0)
LOGITS = rng.normal(size=(B, K)).astype("float32")
CLASSES = rng.integers(0, K, B)
ONE_HOT = np.eye(K, dtype="float32")[CLASSES]
VALUES = rng.normal(size=B).astype("float32")
WEIGHTS = rng.random(B).astype("float32") + 0.1
SCE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def tensors(structure):
    return tf.nest.map_structure(lambda x: tf.constant(np.asarray(x)), structure)


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
    return quantities.target_quantity(name, loss)(label, output, weight)


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
        if kinds.infer(loss, tensors(ONE_HOT), output).name == "classification"
        else target("probability", loss, CLASSES, output)
    )
    p = softmax(LOGITS) if probabilities else softmax(softmax(LOGITS))
    np.testing.assert_allclose(got, -of(p, CLASSES), 1e-5)


@pytest.mark.parametrize("name", targets.names())
def test_a_step_down_the_gradient_pushes_towards_the_class(name):
    logits = tf.constant(LOGITS)
    label = LOGITS.argmax(1)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        value = quantities.target_quantity(name, SCE)(tf.constant(label), logits, None)
    step = logits - 0.1 * tape.gradient(value, logits)
    assert np.all(of(softmax(step.numpy()), label) > of(softmax(LOGITS), label))


def test_target_loss_is_the_loss_with_its_weights():
    got = target("loss", SCE, CLASSES, tensors(LOGITS))
    own = keras.losses.sparse_categorical_crossentropy(CLASSES, LOGITS, from_logits=True)
    np.testing.assert_allclose(got, own * WEIGHTS, 1e-5)


def test_a_function_of_the_task_is_given_the_label_where_it_takes_one():
    label, logits = tf.constant(CLASSES), tf.constant(LOGITS)

    def value(function):
        given = quantities.target_quantity("own", SCE, None, {"own": function})
        return given(label, logits, None)

    np.testing.assert_array_equal(value(lambda outputs, k=2: outputs[:, k]), LOGITS[:, 2])
    for function in (lambda outputs, y: tf.gather(outputs, y, batch_dims=1), _of_label):
        np.testing.assert_array_equal(value(function), LOGITS[np.arange(B), CLASSES])


def _of_label(outputs, label=None):
    return tf.gather(outputs, label, batch_dims=1)


def test_targets_that_cannot_be():
    output = tensors(LOGITS)
    with pytest.raises(InputError, match="parse gives no label"):
        target("loss", SCE, None, output)
    with pytest.raises(InputError, match="--target=best is not known"):
        quantities.target_quantity("best", SCE)
    for name in targets.names()[1:]:
        with pytest.raises(InputError, match=f"--target={name} needs a classifier"):
            target(name, "mse", VALUES, output[:, :1])


def test_targets_of_labels_of_several_classes():
    label = rng.integers(0, 2, (B, K)).astype("float32")
    output = tf.sigmoid(LOGITS)
    for name in ("logit", "probability", "margin"):
        with pytest.raises(InputError, match=f"--target={name} needs.*any number of labels"):
            target(name, "binary_crossentropy", label, output)
    predicted = np.log1p(np.exp(-np.abs(LOGITS))).mean(axis=1)
    got = target("predicted_loss", "binary_crossentropy", label, output)
    np.testing.assert_allclose(got, predicted, 1e-4)


def test_one_class_of_several_sigmoids_if_it_is_said():
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    kind = kinds.infer(loss, tensors(ONE_HOT), tensors(LOGITS), "classification")

    def of_kind(name):
        return quantities.target_quantity(name, loss, kind)(tensors(ONE_HOT), tensors(LOGITS), None)

    own = of(LOGITS, CLASSES)
    np.testing.assert_allclose(of_kind("logit"), -own, 1e-5)
    np.testing.assert_allclose(of_kind("probability"), -1 / (1 + np.exp(-own)), 1e-5)
    np.testing.assert_allclose(of_kind("margin"), -margin(LOGITS, CLASSES), 1e-4)


def test_one_output_without_an_axis_of_its_own():
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    classes = CLASSES % 2
    signed = LOGITS[:, 0] * np.where(classes, 1, -1)
    for name in ("logit", "margin"):
        got = target(name, loss, classes, tensors(LOGITS[:, 0]))
        np.testing.assert_allclose(got, -signed, 1e-5)
