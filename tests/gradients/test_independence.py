"""Random models, and models and losses that mix the examples of a batch, are told by name."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from oracle import engine_of, task_of, values_of

from tracin_beam.errors import InputError
from tracin_beam.gradients import independence

L = keras.layers
N = 12
rng = np.random.default_rng(0)
FEATURES = rng.normal(size=(N, 6)).astype("float32")
CLASSES = rng.integers(0, 3, N)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class AlwaysDropped(L.Dropout):
    def call(self, inputs, training=None):
        return super().call(inputs, training=True)


class KerasNoise(L.Layer):
    def __init__(self, seed=None):
        super().__init__()
        self.seed = keras.random.SeedGenerator(1) if seed is None else seed

    def call(self, x):
        return x + 0.1 * keras.random.normal(tf.shape(x), seed=self.seed)


class TensorFlowNoise(L.Layer):
    @tf.function
    def call(self, x):
        return x * tf.random.uniform(tf.shape(x), seed=3)


class Flipped(L.RandomFlip):
    def call(self, data, training=True):
        return super().call(data, training=True)


class OverBatch(L.Layer):
    def call(self, x):
        return x - tf.reduce_mean(x, axis=0, keepdims=True)


class AlwaysTraining(L.BatchNormalization):
    def call(self, inputs, training=None, mask=None):
        return super().call(inputs, training=True)


class Running(L.Layer):
    def call(self, x):
        return tf.cumsum(x, axis=0)


def between(layer):
    return lambda: keras.Sequential([keras.Input((6,)), L.Dense(4), layer(), L.Dense(3)])


def check(build, features=FEATURES, label=CLASSES, loss=LOSS, **config):
    engine, batch = engine_of(task_of(build, features, label, loss), len(features), **config)
    engine.check_independence(values_of(engine.model), batch)


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (lambda: AlwaysDropped(0.5), "always_dropped.*AlwaysDropped"),
        (KerasNoise, "keras_noise.*KerasNoise"),
        (lambda: KerasNoise(seed=7), "keras_noise.*KerasNoise"),
        (TensorFlowNoise, "tensor_flow_noise.*TensorFlowNoise"),
    ],
)
def test_random_in_inference(layer, name):
    with pytest.raises(InputError, match=rf"(?s)random.*{name}|{name}.*random"):
        check(between(layer))


def test_random_flips_of_pictures():
    def build():
        flat = [Flipped("horizontal"), L.Flatten(), L.Dense(3)]
        return keras.Sequential([keras.Input((3, 3, 1)), *flat])

    pictures = rng.normal(size=(N, 3, 3, 1)).astype("float32")
    with pytest.raises(InputError, match="random in inference mode: layer 'flipped"):
        check(build, pictures)


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (OverBatch, "layer 'over_batch.*OverBatch"),
        (AlwaysTraining, "layer 'always_training.*AlwaysTraining"),
        (lambda: L.Softmax(axis=0), "layer 'softmax.*Softmax"),
        (Running, "layer 'running.*Running"),
    ],
)
def test_models_that_mix(layer, name):
    with pytest.raises(InputError, match=f"{name}.*mixes|mixes.*{name}"):
        check(between(layer))


def test_operations_that_mix():
    def build():
        inputs = keras.Input((6,))
        hidden = L.Dense(4)(inputs)
        hidden = hidden - keras.ops.mean(hidden, axis=0)
        return keras.Model(inputs, L.Dense(3)(hidden))

    with pytest.raises(InputError, match=r"mixes the examples.*operation 'mean.*Mean"):
        check(build)


def test_in_batch_similarities():
    class TwoTowers(keras.Model):
        def __init__(self):
            super().__init__()
            self.one, self.other = L.Dense(4), L.Dense(4)

        def call(self, x):
            return tf.matmul(self.one(x), self.other(x), transpose_b=True)

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    with pytest.raises(InputError, match=r"mixes the examples.*code outside of its layers"):
        check(TwoTowers, label=np.zeros(N, int), loss=loss)


def contrastive(label, embedding):
    similar = tf.matmul(embedding, embedding, transpose_b=True) - 1e3 * tf.eye(len(embedding))
    label = tf.reshape(label, [-1])
    same = tf.cast(label[:, None] == label[None, :], tf.float32) - tf.eye(len(embedding))
    return -tf.reduce_sum(tf.nn.log_softmax(similar) * same, axis=1)


def in_batch_softmax(label, embedding):
    logits = tf.matmul(embedding, embedding, transpose_b=True)
    rows = tf.range(tf.shape(embedding)[0])
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(rows, logits))


def pairwise(label, score):
    signs = tf.sign(tf.reshape(label, [-1, 1]) - tf.reshape(label, [1, -1]))
    signs = tf.cast(signs, tf.float32)
    return tf.reduce_mean(-signs * (score - tf.transpose(score)))


def broadcast_mean(label, output):
    return tf.reduce_mean(tf.square(label["a"] - output["a"]))


def balanced(label, output):
    share = tf.reduce_mean(tf.cast(label, tf.float32))
    weight = tf.where(tf.cast(label, bool), 1.0, share + 0.1)
    each = keras.losses.binary_crossentropy(label, output, from_logits=True)
    return tf.reduce_mean(each * tf.reshape(weight, [-1]))


def hardest(label, output):
    each = keras.losses.sparse_categorical_crossentropy(label, output, from_logits=True)
    return tf.reduce_mean(tf.math.top_k(each, (tf.shape(each)[0] + 1) // 2).values)


class Broadcast(keras.losses.Loss):
    def call(self, label, output):
        return tf.square(tf.cast(label, tf.float32) - output)


@pytest.mark.parametrize(
    ("loss", "units", "message"),
    [
        (contrastive, 3, "contrastive: the loss of an example is"),
        (in_batch_softmax, 3, "in_batch_softmax"),
        (pairwise, 1, "pairwise"),
        (hardest, 3, "hardest: the gradient for an example"),
        (keras.losses.Circle(), 3, "circle: .* in a batch of 8. TracIn needs"),
        (Broadcast(), 1, r"Broadcast.*Labels of shape \(8,\) and outputs of shape \(8, 1\)"),
    ],
)
def test_losses_that_mix(loss, units, message):
    with pytest.raises(InputError, match=f"the loss mixes.*{message}"):
        check(lambda: keras.Sequential([keras.Input((6,)), L.Dense(units)]), loss=loss)


def test_outputs_with_an_axis_more_than_their_labels():
    def build():
        inputs = keras.Input((6,))
        return keras.Model(inputs, {"a": L.Dense(1)(inputs)})

    # Far from the labels, where the gradients of all examples have one sign.
    label = {"a": 10 + FEATURES[:, 0]}
    with pytest.raises(InputError, match=r"the loss mixes.*\(8,\) and outputs of shape \(8, 1\)"):
        check(build, label=label, loss=broadcast_mean)
    check(build, label={"a": label["a"][:, None]}, loss=broadcast_mean)


def test_class_weights_by_the_batch():
    with pytest.raises(InputError, match=r"the loss mixes.*the label of another one"):
        check(
            lambda: keras.Sequential([keras.Input((6,)), L.Dense(1)]),
            label=(np.arange(N) % 3 == 0).astype("float32")[:, None],
            loss=balanced,
        )


def test_dice_over_the_whole_batch_and_by_example():
    def build():
        return keras.Sequential([keras.Input((6,)), L.Dense(5, "sigmoid")])

    label = rng.integers(0, 2, (N, 5)).astype("float32")
    with pytest.raises(InputError, match=r"the loss mixes.*dice"):
        check(build, label=label, loss=keras.losses.Dice())
    check(build, label=label, loss=keras.losses.Dice(axis=-1))


def masked_mean(label, output):
    valid = tf.cast(label > 0, tf.float32)
    found = keras.losses.sparse_categorical_crossentropy(label, output, from_logits=True)
    return tf.reduce_sum(found * valid) / tf.maximum(tf.reduce_sum(valid), 1.0)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize(
    "loss",
    [
        LOSS,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum"),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None),
        masked_mean,
        lambda y, p: tf.reduce_sum(keras.losses.sparse_categorical_crossentropy(y, p, True)),
    ],
)
def test_what_is_each_examples_own(loss, policy):
    def build():
        return keras.Sequential(
            [
                keras.Input((6,)),
                L.Dense(8, "relu", dtype=policy),
                L.BatchNormalization(dtype=policy),
                L.Dropout(0.5),
                L.GaussianNoise(0.3),
                L.Dense(3, dtype=policy),
            ]
        )

    check(build, label=np.where(np.arange(N) % 4, CLASSES, 0), loss=loss)


def test_outputs_that_are_nearly_equal_are_not_taken_for_mixed():
    def build():
        return keras.Sequential([keras.Input((64,)), L.Dense(256), L.Dense(1), L.Rescaling(1, 1e4)])

    features = 1e-3 * rng.normal(size=(N, 64)).astype("float32")
    check(build, features, features[:, 0], "mse")


@pytest.mark.parametrize(
    ("activation", "loss", "label"),
    [
        ("softmax", "sparse_categorical_crossentropy", CLASSES),
        ("softmax", "categorical_crossentropy", np.eye(3, dtype="float32")[CLASSES]),
        ("sigmoid", "binary_crossentropy", np.eye(3, dtype="float32")[CLASSES]),
        ("softmax", "kl_divergence", np.eye(3, dtype="float32")[CLASSES]),
        ("tanh", "cosine_similarity", FEATURES[:, :3]),
        ("sigmoid", "poisson", np.abs(FEATURES[:, :3])),
        (None, "huber", FEATURES[:, :3]),
        (None, "categorical_hinge", np.eye(3, dtype="float32")[CLASSES]),
        (None, "squared_hinge", 2 * np.eye(3, dtype="float32")[CLASSES] - 1),
        ("sigmoid", keras.losses.BinaryFocalCrossentropy(), np.eye(3, dtype="float32")[CLASSES]),
    ],
)
def test_losses_of_outputs_that_keras_remembers_the_making_of(activation, loss, label):
    check(
        lambda: keras.Sequential([keras.Input((6,)), L.Dense(3, activation)]),
        label=label,
        loss=loss,
    )


def test_what_parse_gives_for_a_record():
    together = {"a": tf.constant([[1.0, 2.0], [3.0, 0.0]]), "b": tf.constant(["x", "y"])}
    alone = [
        {"a": tf.constant([[1.0, 2.0]]), "b": tf.constant(["x"])},
        {"a": tf.constant([[3.0]]), "b": tf.constant(["y"])},  # without padding
    ]
    independence.check_parse((together, None, None), [(one, None, None) for one in alone])
    for other in ({"a": tf.constant([[3.1]])}, {"b": tf.constant(["z"])}):
        changed = [alone[0], alone[1] | other]
        with pytest.raises(InputError, match="parse gives other values for a record"):
            independence.check_parse((together, None, None), [(one, None, None) for one in changed])
