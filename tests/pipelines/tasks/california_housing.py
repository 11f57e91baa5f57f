"""A regression with sample weights."""

import keras

import tracin_beam

parse = tracin_beam.Parser(
    features=((13,), "float64"), label=((), "float32"), sample_weight=((), "float32")
)


def build_model():
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((13,)),
            layers.Dense(32, activation="tanh"),
            layers.Dense(16, activation="gelu"),
            layers.Dense(1),
        ]
    )


task = tracin_beam.Task(model=build_model, loss="mean_squared_error", parse=parse)
