"""Models that move the examples about: where they lie is found."""

import keras
import pytest
import tensorflow as tf
from small import SEQUENCES, VECTORS, check

L = keras.layers


class Reshaping(keras.Model):
    """Folds time into the batch, or puts it first."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.dense = L.Dense(6, "tanh")
        self.top = L.Dense(3)

    def call(self, x):
        steps = x.shape[1]
        match self.how:
            case "static":
                batch = x.shape[0] or tf.shape(x)[0]
                x = tf.reshape(self.dense(tf.reshape(x, [batch * steps, 5])), [batch, steps, 6])
            case "dynamic":
                x = tf.reshape(self.dense(tf.reshape(x, [-1, 5])), [-1, steps, 6])
            case "transposed":
                x = tf.transpose(self.dense(tf.transpose(x, [1, 0, 2])), [1, 0, 2])
            case "end to end":
                x = tf.reshape(tf.transpose(x, [1, 0, 2]), [-1, 5])
                x = tf.transpose(tf.reshape(self.dense(x), [steps, -1, 6]), [1, 0, 2])
        return self.top(tf.reduce_mean(x, axis=1))


@pytest.mark.parametrize("how", ["static", "dynamic", "transposed", "end to end"])
@pytest.mark.parametrize("batch_size", [3, 4])
def test_layers_that_do_not_see_the_batch_first(how, batch_size):
    check(lambda: Reshaping(how), SEQUENCES, batch_size=batch_size)


class Repeating(keras.Model):
    """Takes each example several times, next to one another or all of them again and again."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.dense = L.Dense(6, "tanh")
        self.offsets = self.add_weight(shape=(3, 5), name="offsets")
        self.top = L.Dense(3)

    def call(self, x):
        count = tf.shape(x)[0]
        if self.how == "next":
            many = tf.repeat(x, 3, axis=0) + tf.tile(self.offsets.value, [count, 1])
            return self.top(tf.reduce_mean(tf.reshape(self.dense(many), [count, 3, 6]), 1))
        many = tf.tile(x, [3, 1]) + tf.repeat(self.offsets.value, count, axis=0)
        return self.top(tf.reduce_mean(tf.reshape(self.dense(many), [3, count, 6]), 0))


@pytest.mark.parametrize("how", ["next", "again"])
def test_examples_taken_several_times(how):
    check(lambda: Repeating(how), VECTORS)
