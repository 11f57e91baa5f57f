"""Weights by the operations that use them: layers that no rule knows, against the tape."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from layers import Weighted, check_layer
from oracle import check_model, engine_of, task_of, values_of

from tracin_beam.gradients import forms

L = keras.layers
N = 5
CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
rng = np.random.default_rng(0)
VECTORS = rng.normal(size=(N, 6)).astype("float32")
SEQUENCES = rng.normal(size=(N, 4, 6)).astype("float32")
IDS = rng.integers(0, 11, (N, 4))
IMAGES = rng.normal(size=(N, 6, 6, 4)).astype("float32")
CLASSES = rng.integers(0, 3, N)


ops = keras.ops
PRODUCTS = {
    "matmul": (((6, 5),), lambda x, w: ops.matmul(x, w)),
    "transposed": (((5, 6),), lambda x, w: tf.matmul(x, w, transpose_b=True)),
    "einsum": (((6, 2, 3),), lambda x, w: tf.einsum("...d,dhk->...hk", x, w)),
    "two of it": (((6, 6),), lambda x, w: ops.matmul(ops.tanh(ops.matmul(x, w)), w)),
    "two ways": (((6, 6),), lambda x, w: ops.matmul(x, w) * ops.sum(w, axis=0)),
    "in blocks": (((3, 2, 5),), lambda x, w: tf.einsum("...gi,gio->...go", blocks(x), w)),
    "split": (((6, 10),), lambda x, w: multiply(*ops.split(ops.matmul(x, w), 2, axis=-1))),
    "split first": (((6, 10),), lambda x, w: multiply(*[x @ p for p in tf.split(w, 2, axis=1)])),
    "heads": (((2, 6, 3),), lambda x, w: ops.sum(tf.matmul(x[..., None, None, :], w), axis=-3)),
}


def blocks(x):
    return tf.reshape(x, [*x.shape[:-1], 3, 2]) if x.shape[0] else tf.zeros([1, 3, 2])


def multiply(a, b):
    return ops.sigmoid(a) * b


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("features", [VECTORS, SEQUENCES], ids=["vectors", "sequences"])
def test_products(name, features):
    shapes, how = PRODUCTS[name]
    check_layer(lambda: Weighted(shapes, how), features)


def first(x, w):
    return tf.concat([tf.broadcast_to(w, [tf.shape(x)[0], 1, 6]), x], axis=1)


ELEMENTWISE = {
    "added": (((4, 6),), lambda x, w: x + w),
    "a row": (((1, 6),), lambda x, w: x - w),
    "scale": (((6,),), lambda x, w: x * w),
    "one number": (((),), lambda x, w: x * w + w),
    "divided": (((6,),), lambda x, w: x / w),
    "from": (((6,),), lambda x, w: w - x),
    "over": (((6,),), lambda x, w: w / (1 + x**2)),
    "maximum": (((6,),), lambda x, w: tf.maximum(x, w)),
    "power": (((6,),), lambda x, w: tf.pow(1 + x**2, w)),
    "where": (((6,),), lambda x, w: tf.where(x > 0, x, w)),
    "class token": (((1, 1, 6),), first),
    "repeated": (((1, 1, 6),), lambda x, w: tf.concat([tf.repeat(w, tf.shape(x)[0], 0), x], 1)),
    "tiled": (((1, 2, 6),), lambda x, w: tf.concat([tf.tile(w, [tf.shape(x)[0], 1, 1]), x], 1)),
    "on zeros": (((2, 6),), lambda x, w: tf.concat([tf.zeros_like(x[:, :2]) + w, x], 1)),
    "of another axis": (((4, 1),), lambda x, w: x * w),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise(name):
    shapes, how = ELEMENTWISE[name]
    check_layer(lambda: Weighted(shapes, how), SEQUENCES)


CONVOLUTIONS = {
    "convolution": (((3, 3, 4, 2),), lambda x, w: tf.nn.conv2d(x, w, 2, "SAME")),
    "standardised": (
        ((3, 3, 4, 2),),
        lambda x, w: tf.nn.conv2d(x, (w - tf.reduce_mean(w, [0, 1, 2])) * 2, 1, "VALID"),
    ),
    "depthwise": (
        ((3, 3, 4, 2),),
        lambda x, w: tf.nn.depthwise_conv2d(x, w, [1, 1, 1, 1], "SAME"),
    ),
    "explicit padding": (
        ((3, 3, 4, 2),),
        lambda x, w: tf.nn.conv2d(x, w, 2, [[0, 0], [1, 0], [0, 1], [0, 0]]),
    ),
    "transposed": (
        ((3, 3, 2, 4),),
        lambda x, w: tf.nn.conv2d_transpose(x, w, [tf.shape(x)[0], 12, 12, 2], 2),
    ),
    "volume": (
        ((2, 3, 2, 1, 2),),
        lambda x, w: ops.mean(tf.nn.conv3d(x[..., None], w, [1] * 5, "SAME"), axis=-2),
    ),
    "rows as images": (
        ((1, 3, 4, 2), (1, 2, 2, 3)),
        lambda x, w, d: tf.reshape(
            tf.nn.depthwise_conv2d(
                tf.nn.conv2d(tf.reshape(x, [-1, 1, 6, 4]), w, 1, "SAME"), d, [1] * 4, "SAME"
            ),
            [-1, 6, 6, 6],
        ),
    ),
    "columns as images, one column of all first": (
        ((3, 1, 4, 2), (2, 1, 2, 3)),
        lambda x, w, d: tf.reshape(
            tf.nn.depthwise_conv2d(
                tf.nn.conv2d(
                    tf.reshape(tf.transpose(x, [2, 0, 1, 3]), [-1, 6, 1, 4]), w, 1, "SAME"
                ),
                d,
                [1] * 4,
                "SAME",
            ),
            [6, -1, 36],
        )[0],
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    shapes, how = CONVOLUTIONS[name]
    check_layer(lambda: Weighted(shapes, how), IMAGES)


NO_RULE = {
    "of another length for each": (((6, 5),), lambda x, w: sparse(x, w)),
    "complex": (((4, 6), (4, 6)), lambda x, a, b: filtered(x, tf.complex(a, b))),
    "a loop of as many steps as the examples ask for": (
        ((6, 6),),
        lambda x, w: tf.while_loop(
            lambda i, _: i < 3 + tf.cast(0 * tf.reduce_max(x), tf.int32),
            lambda i, h: (i + 1, tf.tanh(h @ w)),
            (0, x),
        )[1],
    ),
}


def sparse(x, w):
    return tf.sparse.sparse_dense_matmul(tf.sparse.from_dense(tf.nn.relu(x)), w)


def filtered(x, w):
    return tf.math.real(tf.signal.fft2d(tf.cast(x, tf.complex64) * w))


@pytest.mark.parametrize("name", NO_RULE)
def test_what_no_rule_is_for_takes_a_product_for_each_example_of_that_layer_alone(name):
    shapes, how = NO_RULE[name]
    features = SEQUENCES if name == "complex" else VECTORS
    paths = [f"weighted/w{i}" for i in range(len(shapes))]
    engine, _ = check_layer(lambda: Weighted(shapes, how), features, general=paths)
    assert engine.slow_weights() == dict.fromkeys(paths, engine.model.layers[1].name)


class Experts(keras.Model):
    """Each example looks its experts' matrices up."""

    def __init__(self):
        super().__init__()
        self.gate, self.top = L.Dense(4), L.Dense(3)
        self.experts = self.add_weight(shape=(4, 6, 5), name="experts")

    def call(self, x):
        share, chosen = tf.math.top_k(tf.nn.softmax(self.gate(x)), 2)
        matrices = tf.gather(self.experts.value, chosen)
        return self.top(tf.einsum("bk,bi,bkio->bo", share, x, matrices))


class Fields(keras.Model):
    """A table for each field, looked up by field and value; makes a layer in its call."""

    def __init__(self):
        super().__init__()
        self.tables = self.add_weight(shape=(4, 11, 3), name="tables")
        self.scales = self.add_weight(shape=(11, 2), name="scales")
        self.top = L.Dense(3)

    def call(self, ids):
        fields = tf.broadcast_to(tf.range(4), tf.shape(ids))
        rows = tf.gather_nd(self.tables.value, tf.stack([fields, tf.cast(ids, tf.int32)], -1))
        scales = tf.gather_nd(self.scales.value, ids[:, :, None])
        return self.top(L.Flatten()(rows)) * tf.reduce_sum(scales, axis=[1, 2])[:, None]


def test_look_up_by_several_indices():
    check_model(Fields, IDS, CLASSES, CROSSENTROPY)


def test_look_up_of_matrices():
    check_model(Experts, VECTORS, CLASSES, CROSSENTROPY)
    engine, batch = engine_of(
        task_of(Experts, VECTORS, CLASSES, CROSSENTROPY), N, projection="countsketch", dim=2048
    )
    got = engine.embed(values_of(engine.model), batch)
    # So long a sketch has hardly two numbers in one place.
    np.testing.assert_allclose(np.sum(got.embedding**2, axis=1), got.squared_norm, 0.1)


def quantised(mode, lora):
    model = keras.Sequential([keras.Input((6,)), L.Dense(8, "relu"), L.Dense(8), L.Dense(3)])
    for layer in model.layers[:2]:
        layer.quantize(mode)
        if lora:
            layer.enable_lora(2)
    return model


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("lora", [False, True])
def test_quantised_layers(mode, lora):
    engine, _ = check_model(lambda: quantised(mode, lora), VECTORS, CLASSES, CROSSENTROPY)
    assert any("lora" in w.path for w in engine.weights) == lora


def test_text_inside_of_the_model():
    text = np.array(["a b c", "b c", "d e f a", "c c c", "a f"])

    class Classifier(keras.Model):
        def __init__(self):
            super().__init__()
            self.words = L.TextVectorization()
            self.words.adapt(list(text))
            self.embedding = L.Embedding(12, 5, mask_zero=True)
            self.pool, self.top = L.GlobalAveragePooling1D(), L.Dense(3)

        def call(self, x):
            return self.top(self.pool(self.embedding(self.words(x))))

    check_model(Classifier, text, CLASSES, CROSSENTROPY)


class Tied(keras.Model):
    """The matrix that looks tokens up also scores them."""

    def __init__(self, how):
        super().__init__()
        self.embedding = L.Embedding(11, 6)
        self.hidden = L.Dense(6, "tanh")
        self.how = how

    def call(self, x):
        return self.how(self.hidden(self.embedding(x)), self.embedding.embeddings.value)


TIES = [
    lambda h, e: ops.matmul(h, ops.transpose(e)),
    lambda h, e: tf.einsum("btd,vd->btv", h, e),
    lambda h, e: tf.matmul(h[:, -1:], e, transpose_b=True) * tf.ones([4, 1]),
]


@pytest.mark.parametrize("how", TIES)
@pytest.mark.parametrize("projection", ["none", "kronecker", "countsketch"])
def test_tied_embeddings(how, projection):
    if projection == "none":
        check_model(lambda: Tied(how), IDS, IDS, CROSSENTROPY)
        return
    # The sum has the same projection whether it is of factors or written out.

    task = task_of(lambda: Tied(how), IDS, IDS, CROSSENTROPY)
    engine, batch = engine_of(task, N, projection=projection, dim=64)
    whole, _ = engine_of(task, N)
    values = values_of(engine.model)
    gradients = whole.embed(values, batch).embedding
    sizes = np.cumsum([spec.size for spec in whole.specs])[:-1]
    parts = np.split(gradients, sizes, axis=1)
    again = sum(
        engine.projection([(spec, forms.Full(tf.constant(part)))]).numpy()
        for spec, part in zip(engine.specs, parts, strict=True)
    )
    np.testing.assert_allclose(engine.embed(values, batch).embedding, again, 1e-3, 1e-4)
