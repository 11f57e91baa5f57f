"""Whole models: the engine's gradients against one `tf.GradientTape` per example."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from oracle import engine_of, task_of, values_of
from small import CLASSES, CROSSENTROPY, IDS, SEQUENCES, VECTORS, N, check, rng

from tracin_beam.errors import InputError
from tracin_beam.gradients.batches import BatchParser
from tracin_beam.gradients.engine import Engine, EngineConfig
from tracin_beam.inputs.task import Task

L = keras.layers


def test_sequential():
    check(lambda: keras.Sequential([L.Dense(6, "relu"), L.Dropout(0.5), L.Dense(3)]))


def test_functional_with_a_model_inside_a_model_and_a_layer_called_twice():
    def build():
        inner = keras.Sequential([L.Dense(5, "tanh"), L.LayerNormalization()], name="inner")
        inputs = keras.Input((5,))
        nested = keras.Model(inputs, inner(inner(inputs)), name="nested")
        shared = L.Dense(5, "tanh")
        x = shared(nested(inputs)) + shared(inputs)
        return keras.Model(inputs, L.Dense(3)(x))

    engine, _ = check(build)
    paths = [w.path for w in engine.weights]
    assert "nested/inner/dense/kernel" in paths


class Tied(keras.Model):
    """Embedding matrix used again for the logits, raw position embeddings, an unused layer."""

    def __init__(self):
        super().__init__()
        self.embedding = L.Embedding(11, 6)
        self.twice = L.Dense(6, "gelu")
        self.unused = L.Dense(2)
        self.unused.build((None, 6))
        self.positions = self.add_weight(
            shape=(4, 6), initializer="random_normal", name="positions"
        )

    def call(self, x):
        hidden = self.embedding(x) + self.positions
        hidden = self.twice(self.twice(hidden))
        return tf.einsum("btd,vd->btv", hidden, self.embedding.embeddings)


def test_weight_tying_raw_weights_and_unused_weights():
    check(Tied, IDS, IDS)


class Mixing(keras.Model):
    """What no per-example gradient is right for: each output depends on the whole batch."""

    def __init__(self):
        super().__init__()
        self.dense = L.Dense(6, "tanh")
        self.top = L.Dense(3)

    def call(self, x):
        x = self.dense(x)
        return self.top(x - tf.reduce_mean(x, axis=0, keepdims=True) + x**2)


def test_verify_finds_a_model_that_mixes_the_examples_of_a_batch():
    engine, batch = engine_of(task_of(Mixing, VECTORS, CLASSES, CROSSENTROPY), N)
    with pytest.raises(InputError, match="mix the examples"):
        engine.verify(values_of(engine.model), batch)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_verify_accepts_sound_models(policy):
    def build():
        keras.config.set_dtype_policy(policy)
        try:
            layers = [L.Dense(64, "relu"), L.BatchNormalization(), L.Dense(32, "relu")]
            return keras.Sequential([*layers, L.Dense(3, dtype="float32")])
        finally:
            keras.config.set_dtype_policy("float32")

    engine, batch = engine_of(task_of(build, VECTORS, CLASSES, CROSSENTROPY), N)
    engine.verify(values_of(engine.model), batch)


class Cell(L.Layer):
    def __init__(self):
        super().__init__()
        self.state_size = 4
        self.inner = L.Dense(4, "tanh")
        self.gain = self.add_weight(shape=(4,), initializer="ones", name="gain")

    def build(self, shape):
        self.inner.build((None, shape[-1] + 4))

    def call(self, x, states):
        state = self.inner(tf.concat([x, states[0]], axis=1)) * self.gain
        return state, [state]


@pytest.mark.parametrize("unroll", [False, True])
def test_custom_cell(unroll):
    check(lambda: keras.Sequential([L.RNN(Cell(), unroll=unroll), L.Dense(3)]), SEQUENCES)


class Looping(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = L.Dense(5, "tanh")
        self.top = L.Dense(3)

    def call(self, x):
        x = self.dense(x)
        _, x = tf.while_loop(
            lambda i, _: i < 3, lambda i, h: (i + 1, self.dense(h)), [tf.constant(0), x]
        )
        return self.top(x)


def test_layer_called_inside_and_outside_of_a_loop():
    check(Looping)


class Overwriting(L.Layer):
    """Gives the layer inside a kernel made of another weight, as weight normalisation does."""

    def __init__(self):
        super().__init__()
        self.dense = L.Dense(4)
        self.direction = self.add_weight(
            shape=(5, 4), initializer="random_normal", name="direction"
        )

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        self.dense.kernel.assign(self.direction / tf.norm(self.direction))
        return self.dense(x)


def test_layer_whose_kernel_is_overwritten_by_a_wrapper():
    task = task_of(
        lambda: keras.Sequential([Overwriting(), L.Dense(3)]), VECTORS, CLASSES, CROSSENTROPY
    )
    engine, batch = engine_of(task, N)
    values = values_of(engine.model)
    got = engine.embed(values, batch)
    direction = next(v for v in engine.model.trainable_variables if v.name == "direction")
    rest = engine.model.layers[0].dense.bias, *engine.model.layers[1].trainable_variables

    def norm(i):
        with tf.GradientTape() as tape:
            w = direction.value
            tape.watch(w)
            hidden = VECTORS[i : i + 1] @ (w / tf.norm(w)) + rest[0].value
            logits = hidden @ rest[1].value + rest[2].value
            loss = CROSSENTROPY(CLASSES[i : i + 1], logits)
        gradients = tape.gradient(loss, [w, *(v.value for v in rest)])
        return sum(float(tf.reduce_sum(g**2)) for g in gradients)

    np.testing.assert_allclose(got.squared_norm, [norm(i) for i in range(N)], 1e-4)


def two_inputs():
    a, b = keras.Input((5,), name="a"), keras.Input((4, 5), name="b")
    return a, b, L.Concatenate()([L.Dense(4, "relu")(a), L.GlobalAveragePooling1D()(b)])


def test_dict_of_inputs_and_of_outputs_with_a_loss_of_ones_own():
    def build():
        a, b, x = two_inputs()
        outputs = {"class": L.Dense(3)(x), "value": L.Dense(1)(x)}
        return keras.Model({"a": a, "b": b}, outputs)

    def loss(y, p):
        classes = keras.losses.sparse_categorical_crossentropy(y["class"], p["class"], True)
        return classes + keras.ops.square(y["value"] - p["value"][:, 0])

    features = {"a": VECTORS, "b": SEQUENCES}
    check(build, features, {"class": CLASSES, "value": VECTORS[:, 0]}, loss)


def test_tuple_of_inputs():
    def build():
        a, b, x = two_inputs()
        return keras.Model((a, b), L.Dense(3)(x))

    check(build, (VECTORS, SEQUENCES))


def test_several_outputs_and_one_label():
    def build():
        inputs = keras.Input((5,))
        return keras.Model(inputs, [L.Dense(3)(inputs), L.Dense(2)(inputs)])

    def loss(y, p):
        first = keras.losses.sparse_categorical_crossentropy(y, p[0], True)
        return first + tf.reduce_sum(p[1] ** 2, axis=1)

    task = task_of(build, VECTORS, CLASSES, loss)
    engine, batch = engine_of(task, N)
    engine.verify(values_of(engine.model), batch)


@pytest.mark.parametrize(
    ("policy", "tolerance"),
    [("mixed_bfloat16", 5e-2), ("mixed_float16", 5e-3), ("float64", 1e-4)],
)
def test_dtype_policies(policy, tolerance):
    def build():
        keras.config.set_dtype_policy(policy)
        try:
            x = inputs = keras.Input((6, 6, 2))
            x = L.Conv2D(4, 3, activation="relu")(x)
            x = L.BatchNormalization()(x)
            x = L.SeparableConv2D(4, 3, activation="relu")(x)
            x = L.PReLU(shared_axes=[1, 2])(L.Flatten()(x)[:, None, None, :])
            return keras.Model(inputs, L.Dense(3, dtype="float32")(L.Flatten()(x)))
        finally:
            keras.config.set_dtype_policy("float32")

    images = rng.normal(size=(N, 6, 6, 2)).astype("float32")
    check(build, images, tolerance=tolerance)


class VariableLength(keras.Model):
    def __init__(self):
        super().__init__()
        self.embedding = L.Embedding(11, 4, mask_zero=True)
        self.attention = L.MultiHeadAttention(2, 3)
        self.convolution = L.Conv1D(4, 3, padding="same", activation="relu")
        self.norm = L.LayerNormalization()
        self.top = L.Dense(3)

    def call(self, x):
        h = self.embedding(x)
        h = self.norm(h + self.attention(h, h))
        return self.top(tf.reduce_mean(self.convolution(h), axis=1))


def test_sequences_of_varying_length():
    lengths = [1, 4, 2, 3, 4, 1]
    rows = [" ".join(map(str, row[:n])).encode() for row, n in zip(IDS + 1, lengths, strict=True)]

    def parse(serialized):
        parts = tf.strings.split(serialized)
        ids = tf.strings.to_number(parts, tf.int32).to_tensor()
        return {"features": ids % 11, "label": ids[:, 0] % 3}

    task = Task(VariableLength, CROSSENTROPY, parse)
    parser = BatchParser(task)
    config = EngineConfig(projection="none", batch_size=4)
    engine = Engine(task, config, parser, parser(rows[:2]))
    values = values_of(engine.model)
    for part in (rows, rows[1:3], rows[:1]):
        batch = parser(part)
        engine.verify(values, batch)
        alone = engine.embed(values, batch)
        queries = engine.queries(values, parser(rows[2:5]))
        expected = alone.embedding @ engine.embed(values, parser(rows[2:5])).embedding.T
        got = engine.scores(values, batch, queries)
        np.testing.assert_allclose(got, expected, 1e-4, 1e-5)
    assert set(engine.trace_counts().values()) == {1}
    assert engine.general == ()


class Unused(keras.Model):
    def __init__(self):
        super().__init__()
        self.top = L.Dense(3)
        self.other = L.Dense(2)

    def call(self, x):
        self.other(x)
        return self.top(tf.stop_gradient(x) * 2)


def test_part_of_the_weights_is_unused():
    engine, _ = check(Unused)
    assert engine.dim == 18 + 12
