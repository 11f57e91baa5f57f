"""A small model and its training, for the tests of checkpoints."""

import json

import keras
import numpy as np

from tracin_beam.inputs.weights import WeightsLoader

STEPS = 4  # to an epoch
X = np.random.default_rng(0).normal(size=(STEPS * 2, 3)).astype(np.float32)
Y = X.sum(1, keepdims=True)
RATE = 0.0625  # a binary fraction, exact in float32


def decay(step):
    """The oracle of `schedule`."""
    return RATE * 0.5 ** (step / 10)


def schedule():
    return keras.optimizers.schedules.ExponentialDecay(RATE, 10, 0.5)


def build(units=2):
    return keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(units, name="hidden"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(1),
        ]
    )


def compiled(rate=RATE, optimizer=keras.optimizers.SGD, model=None, **options):
    model = model or build()
    model.compile(optimizer(rate), "mse", **options)
    return model


def fit(model, *callbacks, epochs=2, **options):
    options = {"batch_size": 2, "shuffle": False, "verbose": 0, **options}
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **options)


def load_weights(model, path):
    WeightsLoader(model).load(path)


def listing(directory):
    return json.loads((directory / "checkpoints.json").read_text())


def saved_steps(directory):
    return [entry["step"] for entry in listing(directory)]
