"""The cost model of ways to a sketch, and choosing another."""

import numpy as np
import pytest
import tensorflow as tf

from tracin_beam.errors import InputError
from tracin_beam.gradients import projections, ways
from tracin_beam.gradients.forms import Full, Outer, Rows, Window, Windowed
from tracin_beam.gradients.projections import WeightSpec


def normal(*shape):
    return tf.constant(np.random.default_rng(len(shape)).normal(size=shape), tf.float32)


def outer(positions, m, n):
    return Outer(normal(2, positions, m), normal(2, positions, n))


def convolution(side, channels, n):
    window = Window((3, 3), (1, 1), (1, 1), "same")
    return Windowed(normal(2, side, side, channels), normal(2, side * side, n), window)


def few_rows():
    return Rows(tf.constant([[0, 1], [2, 2]]), normal(2, 2, 8))


@pytest.mark.parametrize(
    ("form", "way"),
    [
        (outer(1, 784, 512), "tensorsketch"),
        (outer(1, 3, 2), "materialise"),
        (outer(1, 256, 10), "blocks"),
        (outer(128, 256, 256), "compress"),
        (outer(2, 32, 16), "materialise"),
        (convolution(16, 16, 16), "compress"),
        (convolution(2, 1, 1), "materialise"),
        (few_rows(), "rows"),
        (Full(normal(2, 9)), "materialise"),
    ],
)
def test_the_cheapest_way_is_chosen(form, way):
    assert ways.choose(form, 1024) == way


def test_one_position_is_never_compressed():
    # A gradient of rank one loses most by it.
    for m in (1, 8, 64, 512, 4096):
        for dim in (16, 1024, 65536):
            assert ways.choose(outer(1, m, 300), dim) != "compress"


def test_a_long_sketch_of_a_small_layer_is_written_out():
    assert ways.choose(outer(1, 32, 10), 16384) == "materialise"


def test_positions_of_unknown_number_do_not_take_the_fft():
    form = tf.nest.map_structure(
        lambda x: tf.keras.Input(batch_shape=(2, None, x.shape[-1])), outer(4, 300, 200)
    )
    assert "tensorsketch" not in ways.costs(form, 64)


@pytest.mark.parametrize(
    ("positions", "m", "n", "dim"),
    [
        (1, 30, 20, 64),
        (3, 30, 20, 64),
        (1, 20, 30, 64),
        (1, 100, 7, 64),
        (1, 7, 100, 60),
        (1, 9, 9, 81),
    ],
)
def test_exact_ways_give_the_same_sketch(positions, m, n, dim):
    form = outer(positions, m, n)
    spec = WeightSpec("dense/kernel", (m, n))
    exact = [way for way in ways.costs(form, dim) if way != "compress"]
    assert len(exact) == (3 if positions == 1 else 2)
    written, *others = [
        projections.make("countsketch", dim, 0, [spec], f"kernel={way}")([(spec, form)]).numpy()
        for way in sorted(exact)
    ]
    for other in others:
        np.testing.assert_allclose(other, written, rtol=1e-4, atol=1e-4)


def test_a_way_for_some_weights_only():
    specs = [WeightSpec("dense/kernel", (30, 20)), WeightSpec("dense_1/kernel", (30, 20))]
    projection = projections.make("countsketch", 64, 0, specs, "dense_1=materialise")
    assert projection.way(specs[0], outer(1, 30, 20)) == ways.choose(outer(1, 30, 20), 64)
    assert projection.way(specs[1], outer(1, 30, 20)) == "materialise"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kernel", "REGEX=WAY"),
        ("kernel=quickly", "tensorsketch, blocks, rows, materialise, compress"),
        ("(=compress", "not a regular expression"),
        ("conv=compress", "none of the weights: dense/kernel"),
    ],
)
def test_what_cannot_be_chosen(text, message):
    with pytest.raises(InputError, match=message):
        projections.make("countsketch", 64, 0, [WeightSpec("dense/kernel", (3, 2))], text)


def test_a_way_that_the_gradient_cannot_take():
    spec = WeightSpec("conv/kernel", (3, 3, 2, 4))
    projection = projections.make("countsketch", 64, 0, [spec], "conv=tensorsketch")
    with pytest.raises(InputError, match="conv/kernel cannot take tensorsketch"):
        projection([(spec, convolution(4, 2, 4))])


def test_other_projections_have_one_way():
    with pytest.raises(InputError, match="countsketch; gaussian has one way"):
        projections.make("gaussian", 8, 0, [WeightSpec("a", (2,))], "a=materialise")
