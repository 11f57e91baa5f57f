"""What tracin-beam needs to know of this model: how to build it, its loss, and how to read data."""

import keras

import tracin_beam

parse = tracin_beam.Parser(
    features=((8, 8, 1), "float32"), label=((), "int64"), id=((), "string")
)  # as `write_shards` returned it


def build_model() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )


task = tracin_beam.Task(
    model=build_model,
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    parse=parse,
    label_names=[str(digit) for digit in range(10)],
)
