"""A transformer block over hashed words; the records hold the text itself, and no id."""

import keras
import tensorflow as tf

import tracin_beam

WORDS, LENGTH = 400, 32


def tokenize(text):
    """tf.string [B] to int64 [B, LENGTH]; 0 is no word."""
    words = tf.strings.split(tf.strings.regex_replace(tf.strings.lower(text), r"[^a-z]+", " "))
    numbers = tf.strings.to_hash_bucket_fast(words, WORDS - 1) + 1
    return numbers.to_tensor(shape=[None, LENGTH])


def build_model():
    layers = keras.layers
    tokens = keras.Input((LENGTH,), dtype="int64")
    x = layers.Embedding(WORDS, 16, mask_zero=True)(tokens)
    attended = layers.MultiHeadAttention(2, 8)(x, x)
    x = layers.LayerNormalization()(layers.Add()([x, attended]))
    x = layers.Dense(24, activation="gelu")(x)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(tokens, layers.Dense(4, activation="softmax")(x))


def parse(serialized):
    columns = {
        "text": tf.io.FixedLenFeature([], tf.string),
        "label": tf.io.FixedLenFeature([], tf.int64),
    }
    example = tf.io.parse_example(serialized, columns)
    return {"features": tokenize(example["text"]), "label": example["label"]}


task = tracin_beam.Task(build_model, "sparse_categorical_crossentropy", parse)
