"""Layers that loop: their steps are written out, and each use of a weight is seen."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from oracle import check_model

L = keras.layers
ops = keras.ops
N = 4
CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
rng = np.random.default_rng(0)
SEQUENCES = rng.normal(size=(N, 3, 5)).astype("float32")
CLASSES = rng.integers(0, 3, N)


def scanned(layer, x):
    """An own recurrent layer: a decay, a step that sees its own weights, backwards."""

    def step(state, row):
        state = ops.sigmoid(layer.decay) * state + ops.tanh(ops.matmul(row, layer.kernel))
        return state, ops.matmul(state, layer.recurrent)

    start = ops.zeros((ops.shape(x)[0], 4))
    _, outputs = ops.scan(step, start, ops.transpose(x, (1, 0, 2)), reverse=True)
    return ops.sum(outputs, axis=0)


@tf.function
def by_autograph(layer, x):
    state = tf.zeros([tf.shape(x)[0], 4])
    for t in tf.range(x.shape[1]):
        for _ in tf.range(t, 2):
            state = tf.tanh(state @ layer.recurrent + x[:, t] @ layer.kernel)
    return state * layer.decay


def counted(layer, x):
    def step(i, state):
        return state + ops.cast(i, "float32") * ops.matmul(x[:, 0], layer.kernel) * layer.decay

    return ops.matmul(ops.fori_loop(0, 3, step, ops.zeros_like(x[:, 0, :4])), layer.recurrent)


def bounded(layer, x):
    state = ops.matmul(x[:, 0], layer.kernel)
    return ops.while_loop(
        lambda state: True,
        lambda state: ops.tanh(ops.matmul(state, layer.recurrent)) * layer.decay,
        state,
        maximum_iterations=2,
    )


class Looping(keras.Model):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.kernel = self.add_weight(shape=(5, 4), name="kernel")
        self.recurrent = self.add_weight(shape=(4, 4), name="recurrent")
        self.decay = self.add_weight(shape=(4,), name="decay")
        self.top = L.Dense(3)

    def call(self, x):
        return self.top(self.how(self, x))


@pytest.mark.parametrize("how", [scanned, by_autograph, counted, bounded])
def test_loops(how):
    engine, _ = check_model(lambda: Looping(how), SEQUENCES, CLASSES, CROSSENTROPY)
    assert engine.general == ()
