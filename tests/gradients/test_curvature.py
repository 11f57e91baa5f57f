"""K-FAC's scores by the engine's factors, against matrices that are written out in float64."""

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf

from tracin_beam.gradients import forms
from tracin_beam.scoring import curvature

EXAMPLES, QUERIES, DAMPING = 7, 3, 0.3
L = keras.layers


def dense():
    return keras.Sequential([keras.Input((5,)), L.Dense(4, "tanh"), L.Dense(3)])


def convolution():
    layers = [L.Conv2D(3, 2, strides=2, padding="same"), L.LayerNormalization(), L.Flatten()]
    return keras.Sequential([keras.Input((5, 4, 2)), *layers, L.Dense(3)])


def sequence():
    """Rows of an embedding, some looked up twice, and a layer that is called twice."""
    shared = L.Dense(4, activation="tanh", name="shared")
    tokens = keras.Input((6,), dtype="int32")
    x = shared(shared(L.Embedding(9, 4)(tokens)))
    return keras.Model(tokens, L.Dense(3)(L.GlobalAveragePooling1D()(x)))


def _images(rng, *shape):
    return rng.normal(size=(EXAMPLES, *shape)).astype(np.float32)


MODELS = {
    "dense": (dense, lambda rng: _images(rng, 5)),
    "convolution": (convolution, lambda rng: _images(rng, 5, 4, 2)),
    "sequence": (sequence, lambda rng: rng.integers(0, 9, (EXAMPLES, 6)).astype(np.int32)),
}


def inputs_and_gradients(model, x, y, loss, layer):
    """For each call of a layer: its inputs [n, P, m] and output gradients [n, P, k], one by one."""
    own = type(layer).call
    rows = []
    for i in range(len(x)):
        seen = []

        def call(inputs, *args, seen=seen, **kwargs):
            offset = tf.zeros_like(own(layer, inputs))
            tape.watch(offset)
            if layer.activation is keras.activations.linear:
                output = own(layer, inputs) + offset
            else:
                before = tf.matmul(inputs, layer.kernel) + layer.bias + offset
                output = layer.activation(before)
            seen.append((inputs, offset))
            return output

        layer.call = call
        with tf.GradientTape() as tape:
            value = tf.reduce_sum(loss(y[i : i + 1], model(x[i : i + 1], training=False)))
        gradients = tape.gradient(value, [offset for _, offset in seen])
        del layer.call
        rows.append(
            [(a[0].numpy(), g[0].numpy()) for (a, _), g in zip(seen, gradients, strict=True)]
        )
    return rows


def patches(inputs):
    """[P, K·C] of a convolution of size and stride 2 with padding "same" over [5, 4, C]."""
    padded = np.pad(inputs, [(0, 1), (0, 0), (0, 0)])
    return np.stack(
        [padded[i : i + 2, j : j + 2].ravel() for i in range(0, 6, 2) for j in range(0, 4, 2)]
    )


def factors(model, x, y, loss, weight):
    """E Σ_p ã ãᵀ and E (1/P) Σ_p δ δᵀ of a kernel and its bias, which is the last row."""
    layer = next(la for la in model.layers if any(v is weight.variable for v in la.weights))
    a = b = 0.0
    rows = inputs_and_gradients(model, x, y, loss, layer)
    for calls in rows:
        lefts, rights = [], []
        for left, right in calls:
            if weight.shape[:-1] == (2, 2, 2):
                left = patches(left)
            lefts.append(left.astype(np.float64).reshape(-1, weight.size // weight.shape[-1]))
            rights.append(right.astype(np.float64).reshape(-1, weight.shape[-1]))
        left, right = np.concatenate(lefts), np.concatenate(rights)
        left = np.concatenate([left, np.ones_like(left[:, :1])], axis=1)
        a = a + left.T @ left / len(rows)
        b = b + right.T @ right / len(right) / len(rows)
    return a, b


@pytest.mark.parametrize("name", sorted(MODELS))
def test_scores_are_those_of_the_matrices_written_out(name):
    build, features = MODELS[name]
    rng = np.random.default_rng(0)
    x, y = features(rng), rng.integers(0, 3, EXAMPLES)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None)
    engine, batch = oracle.engine_of(oracle.task_of(build, x, y, loss), EXAMPLES)
    values = oracle.values_of(engine.model)
    sums = engine.moments(values, batch, curvature.WIDEST)
    known = curvature.Curvature(curvature.scaled(sums, 1 / EXAMPLES), DAMPING)
    queries = engine.queries(values, batch.take(range(QUERIES)), written_out=True)
    transformed = known.precondition(queries.gradients)
    assert (name == "dense") == any(isinstance(g, forms.Outer) for g in transformed[:1])
    found = engine.scores(values, batch, type(queries)(QUERIES, transformed, written_out=True))

    model = engine.model
    variables = [w.variable for w in engine.weights]
    gradients = oracle.plain_gradients(
        model,
        variables,
        lambda i: loss(y[i : i + 1], model(x[i : i + 1], training=False)),
        EXAMPLES,
    )
    expected = np.zeros((EXAMPLES, QUERIES))
    cuts = np.cumsum([w.size for w in engine.weights])[:-1]
    each = dict(
        zip([w.path for w in engine.weights], np.split(gradients, cuts, axis=1), strict=True)
    )
    for weight in engine.weights:
        bias = weight.path.replace("kernel", "bias")
        if weight.path.endswith("kernel"):
            a, b = factors(model, x, y, loss, weight)
            matrix = np.kron(a, b)
            g = np.concatenate([each[weight.path], each.pop(bias)], axis=1)
        elif weight.path in each:
            g = each[weight.path]
            matrix = np.diag(np.mean(g**2, axis=0))
        else:
            continue
        matrix = matrix + DAMPING * np.trace(matrix) / len(matrix) * np.eye(len(matrix))
        expected += g @ np.linalg.solve(matrix, g[:QUERIES].T)
    close = {"rtol": 2e-3, "atol": 1e-3 * np.abs(expected).max()}
    np.testing.assert_allclose(found, expected, **close)
    squares = engine.quadratic(values, batch, known.parts())
    np.testing.assert_allclose(squares[:QUERIES], np.diag(expected[:QUERIES]), **close)


def test_a_side_that_is_too_wide_has_its_diagonal():
    rng = np.random.default_rng(0)
    a, b = (np.cov(rng.normal(size=(n, 50))) for n in (6, 3))
    q = rng.normal(size=(2, 18))
    matrix = np.kron(np.diag(np.diag(a)), b)
    matrix += 0.5 * np.trace(matrix) / 18 * np.eye(18)
    known = curvature.Kronecker(np.diag(a), b, 0.5)
    expected = np.linalg.solve(matrix, q.T).T
    np.testing.assert_allclose(known(q), expected, rtol=1e-8)
    # The same by the arrays that the engine takes, of one position and of several.
    given = {name: tf.constant(x, tf.float32) for name, x in known.arrays().items()}
    by, right = given["by"], given["right"]
    left = rng.normal(size=(2, 4, 6)).astype(np.float32)
    other = rng.normal(size=(2, 4, 3)).astype(np.float32)
    for form in (forms.Outer(left, other), forms.Outer(left[:, :1], other[:, :1])):
        form = forms.Outer(*map(tf.constant, form))
        g = forms.materialise(form, (6, 3)).numpy().astype(np.float64)
        wanted = np.sum(g * np.linalg.solve(matrix, g.T).T, axis=1)
        squares = forms.quadratic(form, (6, 3), by, None, right, False)
        np.testing.assert_allclose(squares, wanted, rtol=1e-4)
