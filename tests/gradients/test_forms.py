"""The forms' arithmetic against NumPy in float64 on the gradients written out."""

import numpy as np
import pytest
import tensorflow as tf

from tracin_beam.gradients import forms
from tracin_beam.gradients.forms import Full, Outer, Rows, Window, Windowed

B, M, N = 3, 4, 5


def outer(positions, m=M, n=N, batch=B, seed=0):
    rng = np.random.default_rng(seed)
    left = rng.normal(size=(batch, positions, m)).astype("float32")
    right = rng.normal(size=(batch, positions, n)).astype("float32")
    return Outer(tf.constant(left), tf.constant(right))


def rows(positions, dtype="int32", batch=B, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, M, (batch, positions)).astype(dtype)
    return Rows(
        tf.constant(ids), tf.constant(rng.normal(size=(batch, positions, N)).astype("float32"))
    )


WINDOWS = {
    "valid": Window((2, 1), (1, 1), (1, 1), "valid"),
    "same, strides": Window((2, 1), (2, 3), (1, 1), "same"),
    "dilation": Window((2, 1), (1, 1), (2, 1), "valid"),
}


def windowed(name="valid", seed=0):
    """Of a convolution over 5 × 4 positions of 2 channels, so that K·C is M."""
    rng = np.random.default_rng(seed)
    x = tf.constant(rng.normal(size=(B, 5, 4, 2)), tf.float32)
    count = forms.slices(x, WINDOWS[name])[0].shape[1]
    right = tf.constant(rng.normal(size=(B, count, N)), tf.float32)
    return Windowed(x, right, WINDOWS[name])


def written_out(form):
    """float64 [B, N]."""
    match form:
        case Outer(left, right):
            return np.einsum("bpm,bpn->bmn", np.float64(left), np.float64(right)).reshape(
                len(left), -1
            )
        case Rows(ids, values):
            result = np.zeros((len(ids), M, values.shape[-1]))
            for b, p in np.ndindex(*ids.shape):
                result[b, int(ids[b, p])] += np.float64(values[b, p])
            return result.reshape(len(ids), -1)
        case Windowed(x, right, window):
            options = {"padding": window.padding.upper(), "dilations": window.dilations}
            rows = []
            for one, g in zip(x, right, strict=True):
                kernel = tf.Variable(tf.zeros([*window.size, x.shape[-1], N]))
                with tf.GradientTape() as tape:
                    z = tf.nn.conv2d(one[None], kernel, window.strides, **options)
                    total = tf.reduce_sum(z * tf.reshape(g, z.shape))
                rows.append(np.float64(tape.gradient(total, kernel)).ravel())
            return np.stack(rows)
        case Full(value):
            return np.float64(value)


FORMS = {
    "outer, one position": lambda seed=0: outer(1, seed=seed),
    "outer, few positions": lambda seed=0: outer(2, seed=seed),
    "outer, many positions": lambda seed=0: outer(9, seed=seed),
    "rows": lambda seed=0: rows(1, seed=seed),
    "rows, repeated ids": lambda seed=0: rows(11, seed=seed),
    "rows, int64": lambda seed=0: rows(2, "int64", seed=seed),
    **{
        f"windowed, {name}": lambda seed=0, name=name: windowed(name, seed=seed) for name in WINDOWS
    },
    "full": lambda seed=0: Full(
        tf.constant(np.random.default_rng(seed).normal(size=(B, M * N)), tf.float32)
    ),
}


def with_unknown_positions(function, *given):
    """Calls the function traced for an unknown number of positions."""
    specs = [
        type(form)(*(tf.TensorSpec([None, None, *x.shape[2:]], x.dtype) for x in form))
        for form in given
    ]
    return tf.function(function, input_signature=specs, autograph=False)(*given)


@pytest.fixture(params=FORMS)
def make(request):
    return FORMS[request.param]


def test_materialise(make):
    np.testing.assert_allclose(forms.materialise(make(), [M, N]), written_out(make()), 1e-5, 1e-5)


def test_squared_norm(make):
    expected = np.sum(written_out(make()) ** 2, axis=1)
    np.testing.assert_allclose(forms.squared_norm(make()), expected, 1e-5)


def test_dot_of_every_pair(make):
    left, right = make(), make(seed=1)
    right = tf.nest.map_structure(
        lambda x: tf.concat([x, x[:1]], axis=0) if tf.is_tensor(x) else x, right
    )
    got = forms.dot(forms.for_dot(left, [M, N]), forms.for_dot(right, [M, N]))
    expected = written_out(left) @ written_out(right).T
    np.testing.assert_allclose(got, expected, 1e-4, 1e-4)


@pytest.mark.parametrize("form", [outer(1), outer(3), outer(40), rows(1), rows(30)])
def test_unknown_number_of_positions(form):
    expected = written_out(form)
    got = with_unknown_positions(lambda f: forms.materialise(f, [M, N]), form)
    np.testing.assert_allclose(got, expected, 1e-5, 1e-5)
    got = with_unknown_positions(forms.squared_norm, form)
    np.testing.assert_allclose(got, np.sum(expected**2, axis=1), 1e-5)

    def dot(f, g):
        return forms.dot(forms.for_dot(f, [M, N]), forms.for_dot(g, [M, N]))

    got = with_unknown_positions(dot, form, form)
    np.testing.assert_allclose(got, expected @ expected.T, 1e-4, 1e-4)


def test_norms_of_wide_matrices_with_an_unknown_number_of_positions():
    form = outer(3, 300, 400)
    expected = np.sum(written_out(form) ** 2, axis=1)
    np.testing.assert_allclose(with_unknown_positions(forms.squared_norm, form), expected, 1e-4)


@pytest.mark.parametrize(
    "parts",
    [
        [outer(1), outer(3, seed=1)],
        [rows(2), rows(3, "int64", seed=1)],
        [rows(2), outer(2)],
        [outer(2), Full(tf.ones([B, M * N])), rows(1)],
        [outer(1, M * N, 1), outer(2)],
        [outer(4)],
        [windowed(), windowed("dilation", seed=1), outer(1)],
    ],
)
def test_add(parts):
    got = forms.materialise(forms.add(parts, [M, N]), [M, N])
    np.testing.assert_allclose(got, sum(written_out(form) for form in parts), 1e-5, 1e-5)


@pytest.mark.parametrize("form", [outer(1), outer(3), *(windowed(name) for name in WINDOWS)])
def test_project_left(form):
    matrix = tf.constant(np.random.default_rng(3).normal(size=(M, 2)), tf.float32)
    projected = forms.project_left(form, matrix)
    got = tf.matmul(projected, form.right, transpose_a=True)
    expected = np.einsum("mk,bmn->bkn", np.float64(matrix), written_out(form).reshape(B, M, N))
    np.testing.assert_allclose(got, expected, 1e-4, 1e-4)


def test_full_flattens_and_casts():
    form = forms.full(tf.ones([B, 2, 3, 4], tf.float16))
    assert form.value.shape == (B, 24)
    assert form.value.dtype == tf.float32
    assert forms.full(tf.ones([B])).value.shape == (B, 1)


def test_sums_and_products_with_a_vector(make):
    form = make()
    expected = written_out(form)
    weights = np.array([1.0, 0.0, 2.0], np.float32)
    shape = (M, N) if expected.shape[1] == M * N else (expected.shape[1],)
    found = forms.total(form, tf.constant(weights), shape)
    np.testing.assert_allclose(found, weights @ expected, rtol=1e-4, atol=1e-4)
    vector = np.random.default_rng(3).normal(size=expected.shape[1]).astype("float32")
    found = forms.dot_vector(form, tf.constant(vector), shape)
    np.testing.assert_allclose(found, expected @ vector, rtol=1e-4, atol=1e-4)


def test_dot_of_different_forms_is_refused():
    with pytest.raises(TypeError, match="no inner product of Full and Rows"):
        forms.dot(Full(tf.ones([B, M * N])), rows(2))
