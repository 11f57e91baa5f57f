"""A convolutional network for images of clothes.

Without kinks, at which the rounding of a batch would decide between two gradients.
"""

import keras
import tensorflow as tf

import tracin_beam

read = tracin_beam.Parser(features=((28, 28), "uint8"), label=((), "uint8"), id=((), "string"))


def build_model():
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.Activation("silu"),
            layers.Conv2D(16, 3, padding="same", activation="silu"),
            layers.AveragePooling2D(3),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dropout(0.2),
            layers.Dense(24, activation="silu"),
            layers.Dense(10),
        ]
    )


def prepare(images):
    return tf.cast(images[..., None], tf.float32) / 255


def parse(serialized):
    parsed = read(serialized)
    return {**parsed, "features": prepare(parsed["features"])}


loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
task = tracin_beam.Task(model=build_model, loss=loss, parse=parse)
