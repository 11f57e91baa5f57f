"""Weights that go through operations before they meet the examples."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from layers import Weighted, check_layer

N = 5
rng = np.random.default_rng(0)
VECTORS = rng.normal(size=(N, 6)).astype("float32")
SEQUENCES = rng.normal(size=(N, 4, 6)).astype("float32")

ops = keras.ops
PASSAGES = {
    "by a transpose": (((5, 6),), lambda x, w: ops.matmul(x, ops.transpose(w))),
    "low rank": (((6, 2), (2, 5)), lambda x, a, b: ops.matmul(x, 0.5 * ops.matmul(a, b))),
    "plus low rank": (
        ((6, 5), (6, 2), (2, 5)),
        lambda x, w, a, b: ops.matmul(x, w + 2 * ops.matmul(a, b)),
    ),
    "normalised": (((6, 5),), lambda x, w: ops.matmul(x, w / tf.norm(w, axis=0, keepdims=True))),
    "scaled": (((6, 5), (5,)), lambda x, w, s: ops.matmul(x, s * w / tf.norm(w, axis=0))),
    "masked": (((6, 5),), lambda x, w: ops.matmul(x, w * np.tri(6, 5, dtype="float32"))),
    "half of it": (((12, 5),), lambda x, w: ops.matmul(x, w[6:])),
    "squared": (((6, 6),), lambda x, w: ops.matmul(x, ops.matmul(w, w))),
    "softmax of it": (((6, 5),), lambda x, w: ops.matmul(x, ops.softmax(w))),
}


@pytest.mark.parametrize("name", PASSAGES)
@pytest.mark.parametrize("features", [VECTORS, SEQUENCES], ids=["vectors", "sequences"])
def test_passages_to_products(name, features):
    shapes, how = PASSAGES[name]
    check_layer(lambda: Weighted(shapes, how), features)


ELEMENTWISE = {
    "positive": (((6,),), lambda x, w: x * ops.softplus(w)),
    "first of many": (((9, 6),), lambda x, w: x + w[: x.shape[1]]),
    "looked up": (((9, 6),), lambda x, w: x + tf.gather(w, tf.range(tf.shape(x)[1]))),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_passages_to_sums(name):
    shapes, how = ELEMENTWISE[name]
    check_layer(lambda: Weighted(shapes, how), SEQUENCES)
