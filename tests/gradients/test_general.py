"""Products for each example: memory, and the operation that crashes TensorFlow on AMX."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from oracle import assert_close, engine_of, task_of, values_of

from tracin_beam.gradients import general

L = keras.layers
N = 32
CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
rng = np.random.default_rng(0)
IDS = rng.integers(0, 40, (N, 8))
IMAGES = rng.normal(size=(N, 8, 8, 3)).astype("float32")
CLASSES = rng.integers(0, 3, N)


class Decoder(keras.Model):
    """Tied embeddings, positions as a raw weight, causal attention."""

    def __init__(self):
        super().__init__()
        self.embedding = L.Embedding(40, 8)
        self.positions = self.add_weight(shape=(8, 8), name="positions")
        self.attention = L.MultiHeadAttention(2, 4)

    def call(self, ids):
        x = self.embedding(ids) + self.positions
        x = x + self.attention(x, x, use_causal_mask=True)
        return keras.ops.matmul(x, keras.ops.transpose(self.embedding.embeddings))


class Patches(keras.Model):
    """A class token, positions, a scale and a PReLU."""

    def __init__(self):
        super().__init__()
        self.patches = L.Conv2D(8, 4, strides=4)
        self.token = self.add_weight(shape=(1, 1, 8), name="token")
        self.positions = self.add_weight(shape=(1, 5, 8), name="positions")
        self.scale = self.add_weight(shape=(8,), name="scale")
        self.attention = L.MultiHeadAttention(2, 4)
        self.activation = L.PReLU(shared_axes=[1])
        self.top = L.Dense(3)

    def call(self, images):
        x = keras.ops.reshape(self.patches(images), (-1, 4, 8))
        token = keras.ops.broadcast_to(self.token, (keras.ops.shape(x)[0], 1, 8))
        x = keras.ops.concatenate([token, x], axis=1) + self.positions
        x = x + self.scale * self.activation(self.attention(x, x))
        return self.top(x[:, 0])


def lora():
    model = keras.Sequential([keras.Input((8, 8, 3)), L.Flatten(), L.Dense(8), L.Dense(3)])
    for layer in model.layers[1:]:
        layer.enable_lora(2)
    return model


def convnext():
    x = inputs = keras.Input((8, 8, 3))
    x = L.Conv2D(8, 2, strides=2)(x)
    y = L.LayerNormalization()(L.DepthwiseConv2D(3, padding="same")(x))
    x = x + Scale()(L.Dense(8)(L.Dense(16, "gelu")(y)))
    return keras.Model(inputs, L.Dense(3)(L.GlobalAveragePooling2D()(x)))


class Scale(L.Layer):
    def build(self, shape):
        self.gamma = self.add_weight(shape=(shape[-1],), name="gamma")

    def call(self, x):
        return x * self.gamma


def prelu():
    layers = [L.Conv2D(4, 3, strides=2), L.PReLU(), L.Conv2D(4, 2), L.PReLU(shared_axes=[1, 2])]
    return keras.Sequential([keras.Input((8, 8, 3)), *layers, L.Flatten(), L.Dense(3)])


class Cross(L.Layer):
    def build(self, shape):
        self.w = self.add_weight(shape=(8, 1), name="w")
        self.b = self.add_weight(shape=(8,), name="b")

    def call(self, pair):
        first, x = pair
        return first * keras.ops.matmul(x, self.w) + self.b + x


def cross_network():
    inputs = keras.Input((8, 8, 3))
    first = x = L.Dense(8)(L.Flatten()(inputs))
    for _ in range(2):
        x = Cross()([first, x])
    return keras.Model(inputs, L.Dense(3)(x))


MODELS = {
    "convnext": (convnext, IMAGES, CLASSES),
    "prelu": (prelu, IMAGES, CLASSES),
    "cross network": (cross_network, IMAGES, CLASSES),
    "decoder": (Decoder, IDS, IDS),
    "patches": (Patches, IMAGES, CLASSES),
    "lora": (lora, IMAGES, CLASSES),
    "lstm": (
        lambda: keras.Sequential([L.Embedding(40, 8), L.LSTM(4), L.Dense(3)]),
        IDS,
        CLASSES,
    ),
}


def hub(name):
    """A model of KerasHub with random weights, for the next token; untied where they are so."""
    from keras_hub import models

    grouped = {"num_query_heads": 2, "num_key_value_heads": 1}
    sizes = {"num_layers": 1, "hidden_dim": 8, "intermediate_dim": 16}
    plain = {"num_heads": 2, "max_sequence_length": 8}
    more = {"Gemma": {**grouped, "head_dim": 4}, "Llama": grouped}.get(name, plain)
    backbone = getattr(models, f"{name}Backbone")(vocabulary_size=40, **sizes, **more)
    ids = keras.Input((8,), dtype="int32")
    given = {
        "token_ids": ids,
        "padding_mask": keras.ops.ones_like(ids),
        "segment_ids": keras.ops.zeros_like(ids),
    }
    x = backbone({key: value for key, value in given.items() if key in backbone.input})
    x = x["sequence_output"] if isinstance(x, dict) else x
    return keras.Model(ids, backbone.token_embedding(x, reverse=True))


@pytest.mark.parametrize("name", ["Bert", "DistilBert", "GPT2", "Llama", "Gemma"])
def test_keras_hub(name):
    pytest.importorskip("keras_hub", reason="KerasHub is not installed")
    check(lambda: hub(name), IDS, IDS)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rules", [True, False])
def test_no_product_that_crashes_on_amx(name, rules):
    check(*MODELS[name], rules)


def check(build, features, label, rules=True):
    task = task_of(build, features, label, CROSSENTROPY)
    engine, batch = engine_of(task, N, batch_size=N, rules=rules)
    values = values_of(engine.model)
    got = engine.embed(values, batch)
    graph = engine._functions["embed", "loss"].get_concrete_function().graph
    assert not general.unsafe_products(general.operations(graph))
    assert bool(engine.general) != rules
    some = [0, 17]
    expected = [
        np.concatenate([g.ravel() for g in engine._plain(values, batch.take([i]))]) for i in some
    ]
    assert_close(got.embedding[some], np.stack(expected))


def test_the_product_that_crashes_is_known():
    graph = tf.__internal__.FuncGraph("products")
    with graph.as_default():
        tf.matmul(tf.zeros([2, 3, 4, 5]), tf.zeros([2, 3, 5, 6]))
        tf.matmul(tf.zeros([2, 4, 5]), tf.zeros([1, 5, 6]))
        assert not general.unsafe_products(general.operations(graph))
        tf.matmul(tf.zeros([2, 1, 4, 5]), tf.zeros([1, 5, 6]))
    assert general.unsafe_products(general.operations(graph))


def test_chunks_are_bounded_and_divide_the_batch():
    assert general.chunk_size(256, 1000) == 256
    most = general.BYTES // (4 * general._COPIES)
    assert general.chunk_size(256, most) == 1
    assert general.chunk_size(256, most // 100) == 64
    assert general.chunk_size(6, most // 4) == 3
    assert general.chunk_size(7, 100 * most) == 1


@pytest.mark.parametrize("numbers", [1, general.BYTES // 20, general.BYTES])
def test_each_example_by_itself(numbers):
    x = tf.constant(rng.normal(size=(6, 3)), tf.float32)

    @tf.function(autograph=False)
    def run(x):
        return general.per_example(
            lambda e: [tf.reduce_sum(e[0]) * e[0], tf.sort(e[0])], [x], [[3], [3]], numbers
        )

    product, ordered = run(x)
    np.testing.assert_allclose(product, np.sum(x, axis=1, keepdims=True) * x, 1e-6)
    np.testing.assert_array_equal(ordered, np.sort(x, axis=1))
