"""Recurrent layers by all their steps at a time, against the tape."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from oracle import (
    assert_close,
    check_model,
    engine_of,
    plain_gradients,
    task_of,
    values_of,
)

from tracin_beam.errors import InputError
from tracin_beam.inputs.task import Task

L = keras.layers
N = 5
CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
rng = np.random.default_rng(0)
SEQUENCES = rng.normal(size=(N, 4, 3)).astype("float32")
IDS = rng.integers(1, 7, (N, 4))
IDS[0, 2:] = IDS[3, 1:] = 0
IDS[4, 0] = 0
CLASSES = rng.integers(0, 3, N)

LAYERS = {
    "lstm": lambda: L.LSTM(3),
    "lstm without a bias": lambda: L.LSTM(3, use_bias=False),
    "lstm backwards": lambda: L.LSTM(3, go_backwards=True, return_sequences=True),
    "lstm unrolled": lambda: L.LSTM(3, unroll=True),
    "gru": lambda: L.GRU(3),
    "gru, reset before": lambda: L.GRU(3, reset_after=False, return_sequences=True),
    "simple": lambda: L.SimpleRNN(3, activation="relu"),
    "bidirectional": lambda: L.Bidirectional(L.LSTM(2, return_sequences=True)),
    "stacked": lambda: L.RNN([L.LSTMCell(2), L.GRUCell(3)]),
}


def build(layer, inputs):
    x = L.Flatten()(layer(inputs)) if len(layer(inputs).shape) > 2 else layer(inputs)
    return L.Dense(3)(x)


@pytest.mark.parametrize("name", LAYERS)
def test_recurrent_layers(name):
    def model():
        inputs = keras.Input((4, 3))
        return keras.Model(inputs, build(LAYERS[name](), inputs))

    check_model(model, SEQUENCES, CLASSES, CROSSENTROPY)


@pytest.mark.parametrize("name", ["lstm", "gru", "lstm backwards", "bidirectional"])
def test_masked(name):
    def model():
        ids = keras.Input((4,), dtype="int32")
        x = LAYERS[name]()(L.Embedding(7, 3, mask_zero=True)(ids))
        pooled = L.GlobalAveragePooling1D()(x) if len(x.shape) > 2 else x
        return keras.Model(ids, L.Dense(3)(pooled))

    check_model(model, IDS, CLASSES, CROSSENTROPY)


@pytest.mark.parametrize("name", ["lstm", "gru", "bidirectional"])
def test_of_unknown_length(name):
    def model():
        ids = keras.Input((None,), dtype="int32")
        x = LAYERS[name]()(L.Embedding(7, 3, mask_zero=True)(ids))
        pooled = L.GlobalAveragePooling1D()(x) if len(x.shape) > 2 else x
        return keras.Model(ids, L.Dense(3)(pooled))

    lengths = [4, 2, 3, 1, 4]
    words = [rng.integers(1, 7, n) for n in lengths]
    rows = tf.ragged.constant([w.tolist() for w in words])

    def parse(serialized):
        index = tf.strings.to_number(serialized, tf.int32)
        return {"features": tf.gather(rows, index), "label": tf.gather(CLASSES, index)}

    engine, batch = engine_of(Task(model, CROSSENTROPY, parse), N)
    got = engine.embed(values_of(engine.model), batch)

    def loss(i):
        return CROSSENTROPY(CLASSES[i : i + 1], engine.model(words[i][None], training=False))

    expected = plain_gradients(engine.model, [w.variable for w in engine.weights], loss, N)
    assert_close(got.embedding, expected)
    assert not engine.general


def test_states_go_from_one_layer_to_another():
    def model():
        inputs = keras.Input((4, 3))
        _, *states = L.LSTM(3, return_state=True)(inputs)
        x = L.LSTM(3)(inputs[:, ::-1], initial_state=states)
        return keras.Model(inputs, L.Dense(3)(x))

    check_model(model, SEQUENCES, CLASSES, CROSSENTROPY)


def test_one_layer_called_twice():
    def model():
        inputs = keras.Input((4, 3))
        shared = L.GRU(3, return_sequences=True)
        return keras.Model(inputs, L.Dense(3)(L.Flatten()(shared(shared(inputs)))))

    check_model(model, SEQUENCES, CLASSES, CROSSENTROPY)


def test_convolutional():
    videos = rng.normal(size=(N, 3, 5, 5, 2)).astype("float32")

    def model():
        inputs = keras.Input((3, 5, 5, 2))
        x = L.ConvLSTM2D(2, 3, padding="same")(inputs)
        return keras.Model(inputs, L.Dense(3)(L.Flatten()(x)))

    check_model(model, videos, CLASSES, CROSSENTROPY)


def test_wrapped_in_time():
    series = rng.normal(size=(N, 2, 4, 3)).astype("float32")

    def model():
        inputs = keras.Input((2, 4, 3))
        x = L.LSTM(2)(L.TimeDistributed(L.GRU(3))(inputs))
        return keras.Model(inputs, L.Dense(3)(x))

    check_model(model, series, CLASSES, CROSSENTROPY)


def test_what_keeps_its_state_is_refused():
    def model():
        return keras.Sequential([L.LSTM(3, stateful=True), L.Dense(3)])

    task = task_of(model, SEQUENCES, CLASSES, CROSSENTROPY)
    with pytest.raises(InputError, match="is stateful"):
        engine_of(task, N)
