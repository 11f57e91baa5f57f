"""A subclassed model: shared layers, tied and raw weights, an LSTM, two inputs and two outputs."""

import keras
import tensorflow as tf

import tracin_beam

VOCABULARY, LENGTH, WIDTH = 20, 6, 8

parse = tracin_beam.Parser(
    features={"words": ((LENGTH,), "int32"), "numbers": ((WIDTH,), "float32")},
    label={"word": ((), "int64"), "value": ((), "float32")},
)


class Scale(keras.layers.Layer):
    """Multiplies by a weight of its own."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    def call(self, x):
        return x * self.scale


class TwoHeads(keras.Model):
    def __init__(self):
        super().__init__()
        self.embedding = keras.layers.Embedding(VOCABULARY, WIDTH)
        self.shared = keras.layers.Dense(WIDTH, activation="tanh")
        self.lstm = keras.layers.LSTM(WIDTH)
        self.scale = Scale()
        self.head = keras.layers.Dense(1)
        self.bias = self.add_weight(shape=(VOCABULARY,), initializer="zeros", name="bias")

    def call(self, inputs):
        words = self.shared(self.embedding(inputs["words"]))
        state = self.scale(self.lstm(words) + self.shared(inputs["numbers"]))
        tied = tf.matmul(state, tf.convert_to_tensor(self.embedding.embeddings), transpose_b=True)
        return {"word": tied + self.bias, "value": self.scale(state)[:, :1] + self.head(state)}


def loss(label, output):
    """float32 [B]."""
    word = keras.losses.sparse_categorical_crossentropy(
        label["word"], output["word"], from_logits=True
    )
    return word + 0.5 * tf.square(label["value"] - output["value"][:, 0])


def predict(output):
    return tf.argmax(output["word"], axis=1)


task = tracin_beam.Task(model=TwoHeads, loss=loss, parse=parse, predict=predict)
