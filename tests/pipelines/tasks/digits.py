"""Handwritten digits; a record without a label has the label −1."""

import keras
import tensorflow as tf

import tracin_beam


def build_model():
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(12, activation="tanh", name="hidden"),
            layers.Dense(10, name="logits"),
        ]
    )


def parse(serialized):
    columns = {
        "features": tf.io.FixedLenFeature([], tf.string),
        "label": tf.io.FixedLenFeature([], tf.int64, default_value=-1),
    }
    example = tf.io.parse_example(serialized, columns)
    pixels = tf.ensure_shape(tf.io.decode_raw(example["features"], tf.float32), [None, 64])
    return {"features": pixels, "label": example["label"]}


loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
task = tracin_beam.Task(model=build_model, loss=loss, parse=parse)
