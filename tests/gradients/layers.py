"""Models of one layer that has weights of any shapes and does anything with them."""

import keras
import numpy as np
import tensorflow as tf
from oracle import check_model

L = keras.layers
CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def check_layer(layer, features, **options):
    """A model of the layer, then mean pooling and a dense layer."""

    def build():
        x = inputs = keras.Input(features.shape[1:], dtype=features.dtype.name)
        x = layer()(x)
        if len(x.shape) > 2:
            x = L.Flatten()(x) if None not in x.shape[1:] else L.GlobalAveragePooling1D()(x)
        return keras.Model(inputs, L.Dense(3)(x))

    classes = np.arange(len(features)) % 3
    return check_model(build, features, classes, CROSSENTROPY, **options)


class Weighted(L.Layer):
    """A layer with weights of these shapes, and what it does with them."""

    def __init__(self, shapes, how):
        super().__init__()
        self.shapes, self.how = shapes, how

    def build(self, _):
        self.own = [self.add_weight(shape=s, name=f"w{i}") for i, s in enumerate(self.shapes)]

    def call(self, x):
        return self.how(x, *(w.value for w in self.own))

    def compute_output_shape(self, shape):
        return tuple(self.how(tf.zeros([2, *shape[1:]]), *map(tf.zeros, self.shapes)).shape)
