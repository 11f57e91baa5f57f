"""Models with functions inside that hide what they do from a trace."""

import keras
import pytest
import tensorflow as tf
from oracle import values_of
from small import check

L = keras.layers


class Compiled(L.Layer):
    """A layer whose call is a `tf.function`, which keeps what it was traced with."""

    def __init__(self):
        super().__init__()
        self.dense = L.Dense(5, "tanh")
        self.scale = self.add_weight(shape=(5,), initializer="ones", name="scale")

    @tf.function
    def call(self, x):
        return self.dense(x) * self.scale


def test_layer_whose_call_is_a_tf_function():
    engine, batch = check(lambda: keras.Sequential([Compiled(), L.Dense(3)]))
    values = values_of(engine.model)
    engine.model.set_weights([0 * w for w in engine.model.get_weights()])
    engine.verify(values, batch)


def test_rematerialised_layers():
    def build():
        with keras.RematScope(mode="full"):
            block = keras.Sequential([L.Dense(6, "relu"), L.Dense(4)])
            return keras.Sequential([block, L.Dense(3)])

    check(build)


@tf.function
def outside(x, w):
    return tf.tanh(tf.matmul(x, w))


class Calling(keras.Model):
    """Its weights go to functions that are no layer's."""

    def __init__(self, how):
        super().__init__()
        self.inner, self.top = L.Dense(5), L.Dense(3)
        self.inner.build((None, 5))
        self.own = self.add_weight(shape=(5, 5), initializer="orthogonal", name="own")
        match how:
            case "given":
                self.function = lambda x: outside(x, self.own)
            case "found":
                signature = [tf.TensorSpec([None, 5])]
                self.function = lambda x: self.found(x) + outside(x, self.own)
                self.found = tf.function(lambda x: tf.tanh(self.inner(x)), signature)
            case "again":
                self.function = keras.remat(lambda x: self.inner(x) @ self.own.value)

    def call(self, x):
        return self.top(self.function(x))


@pytest.mark.parametrize("how", ["given", "found", "again"])
def test_functions_that_are_no_layers(how):
    check(lambda: Calling(how))
