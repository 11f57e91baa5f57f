"""The choice of weights, and their names."""

import keras
import pytest
from small import check

from tracin_beam.errors import InputError
from tracin_beam.gradients.selection import select_weights

L = keras.layers


def frozen():
    return keras.Sequential([L.Dense(6, "relu", trainable=False), L.Dense(4), L.Dense(3)])


def test_frozen_layers_are_left_out():
    engine, _ = check(frozen)
    assert [w.path for w in engine.weights] == [
        "dense_1/kernel",
        "dense_1/bias",
        "dense_2/kernel",
        "dense_2/bias",
    ]


@pytest.mark.parametrize(
    ("layers", "paths"),
    [
        ("last", ["dense_2/kernel", "dense_2/bias"]),
        ("kernel$", ["dense_1/kernel", "dense_2/kernel"]),
        ("^dense_1/", ["dense_1/kernel", "dense_1/bias"]),
    ],
)
def test_choice_of_layers(layers, paths):
    engine, _ = check(frozen, layers=layers)
    assert [w.path for w in engine.weights] == paths


def test_choice_of_layers_that_chooses_nothing():
    model = frozen()
    model.build((None, 5))
    with pytest.raises(InputError, match="matches none of the trainable weights: dense_1/kernel"):
        select_weights(model, "conv")
    with pytest.raises(InputError, match="not a regular expression"):
        select_weights(model, "dense(")
    model.trainable = False
    with pytest.raises(InputError, match="no trainable weight"):
        select_weights(model, "all")


class SameNames(keras.Model):
    def __init__(self):
        super().__init__()
        self.blocks = [L.Dense(5, "tanh", name="block") for _ in range(2)]
        self.third = L.Dense(3, name="block_1")

    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return self.third(x)


def test_layers_of_the_same_name_have_paths_of_their_own():
    engine, _ = check(SameNames)
    paths = [w.path for w in engine.weights]
    assert len(set(paths)) == len(paths)
    assert engine.dim == 30 + 30 + 18


def test_paths_do_not_depend_on_models_built_before():
    def build():
        inputs = keras.Input((5,))
        inner = keras.Sequential([L.Dense(4), L.Dense(5)])
        x = L.Dense(5)(inner(inputs))
        return keras.Model(inputs, L.BatchNormalization()(x))

    first = [w.path for w in select_weights(build(), "all")]
    frozen().build((None, 5))
    assert [w.path for w in select_weights(build(), "all")] == first
    assert first[:2] == ["sequential/dense/kernel", "sequential/dense/bias"]
    assert len(set(first)) == len(first)
