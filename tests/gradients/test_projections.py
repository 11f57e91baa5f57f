"""Projections: unbiased, linear, deterministic, and with the variance that theory gives them."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from tracin_beam.errors import InputError
from tracin_beam.gradients import forms, projections
from tracin_beam.gradients.forms import Full, Outer, Rows, Window, Windowed
from tracin_beam.gradients.projections import WeightSpec

RANDOM = ["countsketch", "gaussian", "kronecker"]


def normal(rng, *shape):
    return tf.constant(rng.normal(size=shape), tf.float32)


def outer(positions, m, n):
    return lambda rng: Outer(normal(rng, 2, positions, m), normal(rng, 2, positions, n))


def rows(positions, vocabulary, n):
    def make(rng):
        ids = rng.integers(0, vocabulary, (2, positions)).astype("int32")
        return Rows(tf.constant(ids), normal(rng, 2, positions, n))

    return make


def convolution(size, strides, dilations, padding, channels, n):
    def make(rng):
        window = Window(size, strides, dilations, padding)
        x = normal(rng, 2, *[9] * len(size), channels)
        positions = forms.slices(x, window)[0].shape[1]
        return Windowed(x, normal(rng, 2, positions, n), window)

    return make


def full(size):
    return lambda rng: Full(normal(rng, 2, size))


def windowed(length, channels, n):
    """A convolution in one dimension, of window 3, over this length, with n filters."""
    window = Window((3,), (1,), (1,), "same")
    return lambda rng: Windowed(normal(rng, 2, length, channels), normal(rng, 2, length, n), window)


# name: weight's shape, its gradients for two examples, dim
CASES = {
    "outer, one position": ((7, 5), outer(1, 7, 5), 16),
    "outer, FFT by position": ((12, 20), outer(3, 12, 20), 32),
    "outer, many positions": ((7, 5), outer(30, 7, 5), 16),
    "outer, wide": ((3, 40), outer(1, 3, 40), 16),
    "outer, tall": ((40, 3), outer(1, 40, 3), 16),
    "outer, both wider than dim": ((40, 30), outer(1, 40, 30), 16),
    "outer, dim of no power of two": ((9, 8), outer(1, 9, 8), 36),
    "outer, dim prime": ((9, 8), outer(1, 9, 8), 31),
    "outer, dim odd": ((16, 3), outer(1, 16, 3), 45),
    "outer, one column": ((9, 1), outer(2, 9, 1), 16),
    "outer, one row": ((1, 9), outer(1, 1, 9), 16),
    "outer of a convolution": ((3, 3, 2, 4), outer(4, 18, 4), 32),
    "windowed": ((3, 2, 4), windowed(5, 2, 4), 32),
    "outer, large": ((60, 50), outer(80, 60, 50), 64),
    "windowed, large": ((3, 20, 50), windowed(80, 20, 50), 64),
    "windowed, strided, large": (
        (3, 2, 8, 70),
        convolution((3, 2), (2, 1), (1, 1), "valid", 8, 70),
        64,
    ),
    "windowed, causal, large": ((5, 16, 9), convolution((5,), (1,), (1,), "causal", 16, 9), 48),
    "rows": ((50, 6), rows(4, 50, 6), 16),
    "rows, few and long": ((3, 20), rows(4, 3, 20), 16),
    "full, one axis": ((11,), full(11), 16),
    "full, one long axis": ((70,), full(70), 16),
    "full, two axes": ((6, 7), full(42), 16),
    "full, four axes": ((2, 3, 4, 5), full(120), 31),
    "full, no axis": ((), full(1), 16),
}


def estimates(name, case, seeds):
    """⟨u, v⟩, ‖u‖²‖v‖² and, for each seed, ⟨Su, Sv⟩ for the two examples u and v."""
    shape, make, dim = CASES[case]
    form = make(np.random.default_rng(5))
    spec = WeightSpec("layer/kernel", shape)
    u, v = np.float64(forms.materialise(form, shape))
    got = []
    for seed in range(seeds):
        projection = projections.make(name, dim, seed, [spec])
        a, b = np.float64(projection([(spec, form)]))
        got.append(a @ b)
    return u @ v, (u @ u) * (v @ v), np.array(got), dim


# Of the slow ones a choice: they treat all shapes alike.
SOME = ["outer, one position", "outer of a convolution", "rows", "full, one axis", "full, two axes"]


@pytest.mark.parametrize(
    ("name", "case", "seeds"),
    [("countsketch", case, 300) for case in CASES]
    + [(name, case, 120) for name in ("gaussian", "kronecker") for case in SOME],
)
def test_unbiased_and_variance(name, case, seeds):
    true, norms, got, dim = estimates(name, case, seeds)
    assert abs(got.mean() - true) <= 5 * got.std() / np.sqrt(seeds) + 1e-5 * np.sqrt(norms)
    theory = (norms + true**2) / dim
    if name == "kronecker" and len(CASES[case][0]) > 1:
        k = next(k for k in range(int(dim**0.5), 0, -1) if dim % k == 0)
        theory = ((1 + 2 / k) * (1 + 2 * k / dim) - 1) * norms
    if name == "countsketch" and "large" in case:
        theory += compression_variance(case)
    assert got.var() <= 1.7 * theory


def test_estimated_norms_are_unbiased_and_say_how_far_they_are_off():
    case = "windowed, strided, large"
    shape, make, dim = CASES[case]
    form = make(np.random.default_rng(5))
    bias = WeightSpec("layer/bias", (9,)), full(9)(np.random.default_rng(6))
    kernel = WeightSpec("layer/kernel", shape)
    exact = sum(
        np.sum(np.float64(forms.materialise(f, s.shape)) ** 2, axis=1)
        for s, f in ((kernel, form), bias)
    )
    norms, errors = [], []
    for seed in range(200):
        projection = projections.make("countsketch", dim, seed, [kernel, bias[0]])
        prepared = [one for _, one in projection.prepare([(kernel, form), bias])]
        norm, error = forms.estimated_norm(prepared)
        norms.append(norm)
        errors.append(error)
    norms, errors = np.float64(norms), np.float64(errors)
    assert np.all(np.abs(norms.mean(axis=0) - exact) <= 5 * norms.std(axis=0) / 200**0.5)
    np.testing.assert_allclose((errors**2).mean(axis=0), norms.var(axis=0), 0.5)
    assert np.all(norms.std(axis=0) > 0)
    # Of the mean over the window nothing is random.
    norm, error = forms.estimated_norm([bias[1]])
    np.testing.assert_allclose(norm, np.sum(np.square(bias[1].value), axis=1), 1e-5)
    assert not np.any(error)


def test_pieces_of_a_sketch_are_added_at_their_places():
    rng = np.random.default_rng(0)
    places, sizes = [3, 3, 15, 0, 7], [5, 16, 2, 40, 1]
    pieces = [
        projections._Piece(
            place, rng.normal(size=(2, n)).astype("float32"), rng.choice([-1.0, 1.0], n)
        )
        for place, n in zip(places, sizes, strict=True)
    ]
    expected = np.zeros((2, 16))
    for piece in pieces:
        for i in range(piece.value.shape[1]):
            expected[:, (piece.place + i) % 16] += piece.value[:, i] * piece.signs[i]
    np.testing.assert_allclose(projections._laid_together(pieces, 16), expected, 1e-5, 1e-6)


def compression_variance(case):
    """What random signs A [k, m] and B [n, l] add in A U B: the sum of both sides' variances."""
    shape, make, _ = CASES[case]
    form = make(np.random.default_rng(5))
    columns = form.right.shape[-1]
    u, v = np.float64(forms.materialise(form, shape)).reshape(2, -1, columns)
    k, most = (16, 64) if isinstance(form, Windowed) else (32, 32)
    left = (np.sum((u.T @ v) ** 2) + np.sum((u @ u.T) * (v @ v.T))) / k
    right = (np.sum((u @ v.T) ** 2) + np.sum((u.T @ u) * (v.T @ v))) / min(columns, most)
    return left + right


@pytest.mark.parametrize("name", RANDOM)
def test_layers_are_independent(name):
    rng = np.random.default_rng(0)
    specs = [WeightSpec("a/kernel", (6, 5)), WeightSpec("b/kernel", (6, 5))]
    form = outer(1, 6, 5)(rng)
    u, v = np.float64(forms.materialise(form, (6, 5)))
    got = []
    for seed in range(120):
        projection = projections.make(name, 16, seed, specs)
        a, b = np.float64(projection([(spec, form) for spec in specs]))
        got.append(a @ b)
    assert abs(np.mean(got) - 2 * u @ v) <= 5 * np.std(got) / np.sqrt(120)


def matrix_by_units(projection, spec, m, n):
    """S as float64 [m·n, dim], from unit vectors given as outer products."""
    left = np.repeat(np.eye(m), n, axis=0)[:, None]
    right = np.tile(np.eye(n), (m, 1))[:, None]
    form = Outer(tf.constant(left, tf.float32), tf.constant(right, tf.float32))
    return np.float64(projection([(spec, form)]))


@pytest.mark.parametrize("name", ["countsketch", "gaussian", "kronecker", "none"])
@pytest.mark.parametrize(
    ("m", "n", "dim"),
    [(5, 4, 16), (5, 40, 16), (9, 8, 31), (16, 3, 45), (1, 9, 16), (9, 1, 12), (40, 30, 16)],
)
def test_the_same_map_whichever_form_a_gradient_has(name, m, n, dim):
    spec = WeightSpec("layer/kernel", (m, n))
    projection = projections.make(name, dim, 3, [spec])
    matrix = matrix_by_units(projection, spec, m, n)
    rng = np.random.default_rng(0)
    few, many = outer(1, m, n)(rng), outer(50, m, n)(rng)
    ids = tf.constant(rng.integers(0, m, (2, 3)))
    embedding = Rows(ids, normal(rng, 2, 3, n))
    for form in (few, many, embedding):
        value = forms.materialise(form, spec.shape)
        expected = np.float64(value) @ matrix
        scale = np.abs(expected).max()
        for given in (form, Full(value)):
            np.testing.assert_allclose(projection([(spec, given)]), expected, 1e-4, 1e-5 * scale)


# Large matrices are compressed first, unless they are given written out.
@pytest.mark.parametrize("case", [case for case in CASES if "large" not in case])
def test_linear(case):
    shape, make, dim = CASES[case]
    form = make(np.random.default_rng(0))
    spec = WeightSpec("layer/kernel", shape)
    for name in RANDOM:
        projection = projections.make(name, dim, 0, [spec])
        value = forms.materialise(form, shape)
        combined = Full(2 * value[:1] - 3 * value[1:])
        parts = projection([(spec, form)])
        expected = 2 * parts[0] - 3 * parts[1]
        got = projection([(spec, combined)])[0]
        np.testing.assert_allclose(got, expected, 1e-4, 1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("case", ["outer, large", "windowed, large"])
def test_large_matrices_are_projected_linearly(case):
    shape, make, dim = CASES[case]
    a = make(np.random.default_rng(0))
    right = normal(np.random.default_rng(1), *a.right.shape)
    spec = WeightSpec("layer/kernel", shape)
    projection = projections.make("countsketch", dim, 0, [spec])
    first, second, both = (
        projection([(spec, a._replace(right=g))]) for g in (a.right, right, 2 * a.right - right)
    )
    expected = 2 * first - second
    np.testing.assert_allclose(both, expected, 1e-4, 1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", RANDOM)
def test_an_embedding_does_not_depend_on_the_rest_of_the_batch(name):
    specs = [WeightSpec("a/kernel", (12, 20)), WeightSpec("a/bias", (20,))]
    rng = np.random.default_rng(0)
    left, right = normal(rng, 6, 2, 12), normal(rng, 6, 2, 20)
    projection = projections.make(name, 32, 0, specs)

    def project(index):
        a, g = tf.gather(left, index), tf.gather(right, index)
        bias = Full(tf.reduce_sum(g, axis=1))
        return projection(list(zip(specs, [Outer(a, g), bias], strict=True)))

    together = project([0, 1, 2, 3, 4, 5])
    np.testing.assert_allclose(project([4]), together[4:5], 1e-4, 1e-4)
    np.testing.assert_allclose(project([5, 0]), tf.gather(together, [5, 0]), 1e-4, 1e-4)


@pytest.mark.parametrize("name", RANDOM)
def test_unknown_number_of_positions(name):
    spec = WeightSpec("a/kernel", (12, 20))
    projection = projections.make(name, 32, 0, [spec])
    form = outer(3, 12, 20)(np.random.default_rng(0))
    signature = [tf.TensorSpec([None, None, n]) for n in (12, 20)]
    traced = tf.function(
        lambda a, g: projection([(spec, Outer(a, g))]), input_signature=signature, autograph=False
    )
    np.testing.assert_allclose(traced(*form), projection([(spec, form)]), 1e-4, 1e-4)


DETERMINISM = """
import numpy as np, tensorflow as tf
from tracin_beam.gradients import projections
from tracin_beam.gradients.forms import Full, Outer
for name in {names}:
    for shape in [(5, 4), (6,)]:
        spec = projections.WeightSpec("layer/kernel", shape)
        projection = projections.make(name, 8, 1, [spec])
        value = np.arange(spec.size, dtype="float32")[None]
        print(*projection([(spec, Full(tf.constant(value)))]).numpy()[0].tolist())
"""


def test_another_process_draws_the_same_maps(capsys):
    source = DETERMINISM.format(names=RANDOM)
    environment = {**os.environ, "PYTHONHASHSEED": "7", "CUDA_VISIBLE_DEVICES": "-1"}
    other = subprocess.run(
        [sys.executable, "-c", source], env=environment, check=True, capture_output=True, text=True
    )
    exec(source, {})
    assert capsys.readouterr().out == other.stdout
    assert len(other.stdout.splitlines()) == 6


def test_known_values():
    """Embeddings on disk stay valid only if these never change."""
    spec = WeightSpec("layer/kernel", (5, 4))
    value = Full(tf.range(20.0)[None])
    signs = projections.random_signs(12, 1, spec, "rows")
    assert signs.tolist() == [-1, 1, 1, -1, 1, 1, -1, 1, -1, 1, 1, 1]
    got = projections.make("countsketch", 8, 1, [spec])([(spec, value)])
    np.testing.assert_array_equal(got[0], [5, 19, -4, -21, 7, 19, -10, -17])


@pytest.mark.parametrize("name", RANDOM)
def test_seeds_paths_and_shapes_draw_different_maps(name):
    form = Full(tf.ones([1, 20]))
    specs = [WeightSpec("a", (4, 5)), WeightSpec("b", (4, 5)), WeightSpec("a", (5, 4))]
    got = [
        projections.make(name, 8, seed, [spec])([(spec, form)]).numpy()
        for spec in specs
        for seed in (0, 1)
    ]
    for i, a in enumerate(got):
        for b in got[:i]:
            assert not np.allclose(a, b)


def test_signs_are_balanced_and_uncorrelated():
    a = projections.random_signs(10_001, 0, WeightSpec("a", (10_001,)), "rows")
    b = projections.random_signs(10_001, 0, WeightSpec("a", (10_001,)), "columns")
    assert set(a) == {-1.0, 1.0}
    assert abs(a.sum()) < 500
    assert abs(a @ b) < 500
    assert abs(a[1:] @ a[:-1]) < 500


def test_none_is_exact_and_leaves_zeros_for_weights_without_a_gradient():
    specs = [WeightSpec("a", (3, 2)), WeightSpec("b", (4,)), WeightSpec("c", (2,))]
    projection = projections.make("none", 1, 0, specs)
    form = outer(2, 3, 2)(np.random.default_rng(0))
    last = tf.constant([[1.0, 2.0], [3.0, 4.0]])
    got = projection([(specs[2], Full(last)), (specs[0], form)])
    assert projection.dim == 12
    expected = tf.concat([forms.materialise(form, (3, 2)), tf.zeros([2, 4]), last], axis=1)
    np.testing.assert_array_equal(got, expected)


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="--projection=sketch is not known; take one of"):
        projections.make("sketch", 8, 0, [])
    assert {*RANDOM, "none"} <= set(projections.names())
