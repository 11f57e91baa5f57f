"""Layers of many kinds in one small model each, as papers have them: no rule knows any of them."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from layers import Weighted, check_layer

N = 4
ops = keras.ops
rng = np.random.default_rng(0)
VECTORS = rng.normal(size=(N, 6)).astype("float32")
SEQUENCES = rng.normal(size=(N, 4, 6)).astype("float32")


def capsules(x, w):
    """Routing by agreement (Sabour et al., 2017, arXiv 1710.09829)."""
    votes = tf.einsum("iok,bi->biok", w, x)
    logits = tf.zeros_like(votes[..., :1])
    for _ in range(2):
        sums = tf.reduce_sum(tf.nn.softmax(logits, axis=2) * votes, axis=1, keepdims=True)
        squared = tf.reduce_sum(sums**2, axis=-1, keepdims=True)
        outputs = sums * tf.sqrt(squared) / (1 + squared)
        logits += tf.reduce_sum(votes * outputs, axis=-1, keepdims=True)
    return tf.reshape(outputs, [-1, 6])


def graph_attention(x, w, left, right):
    """Veličković et al., 2018, arXiv 1710.10903, on a graph that the examples hold."""
    joined = tf.matmul(x, x, transpose_b=True) > 0
    hidden = tf.einsum("bnd,dhf->bnhf", x, w)
    scores = (
        tf.reduce_sum(hidden * left, -1)[:, :, None] + tf.reduce_sum(hidden * right, -1)[:, None]
    )
    scores = tf.where(joined[..., None], tf.nn.leaky_relu(scores), -1e9)
    return tf.reshape(tf.einsum("bnmh,bmhf->bnhf", tf.nn.softmax(scores, axis=2), hidden), [-1, 24])


def mixed_cross(x, u, v, middle, gate):
    """Low-rank crosses of several experts (Wang et al., 2021, arXiv 2008.13535)."""
    inner = tf.tanh(tf.einsum("bd,edr->ber", x, v))
    inner = tf.tanh(tf.einsum("ber,erq->beq", inner, middle))
    outputs = x[:, None] * tf.einsum("beq,edq->bed", inner, u)
    return x + tf.einsum("be,bed->bd", tf.nn.softmax(x @ gate), outputs)


def hypernetwork(x, generator, gates):
    """Each example's own matrix, and a gated linear unit."""
    own = tf.reshape(tf.tanh(x) @ generator, [-1, 6, 2])
    value, gate = tf.split(x @ gates, 2, axis=-1)
    return tf.einsum("bi,bij->bj", value * tf.sigmoid(gate), own)


def selective_scan(x, decay, steps, inputs):
    """A state space whose steps depend on what is read, all of them at a time."""
    size = tf.nn.softplus(x @ steps)
    factors = tf.exp(-size[..., None] * tf.exp(decay))
    terms = (size * x)[..., None] * (x @ inputs)[:, :, None]

    def join(one, other):
        return one[0] * other[0], other[0] * one[1] + other[1]

    _, states = ops.associative_scan(join, (factors, terms), axis=1)
    return tf.reduce_sum(tf.reshape(states, [-1, 4, 6, 2]), axis=[1, 3])


def ensemble(x, w, left, right):
    """One matrix, and factors for each member (Wen et al., 2020, arXiv 2002.06715)."""
    return tf.reduce_mean(tf.nn.relu((x[:, None] * left) @ w * right), axis=1)


UNSEEN = {
    "capsules": (VECTORS, ((6, 3, 2),), capsules),
    "graph attention": (SEQUENCES, ((6, 2, 3), (2, 3), (2, 3)), graph_attention),
    "crosses": (VECTORS, ((2, 6, 3), (2, 6, 3), (2, 3, 3), (6, 2)), mixed_cross),
    "hypernetwork": (VECTORS, ((6, 12), (6, 12)), hypernetwork),
    "selective scan": (SEQUENCES, ((6, 2), (6, 6), (6, 2)), selective_scan),
    "ensemble": (VECTORS, ((6, 5), (3, 6), (3, 5)), ensemble),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_no_weight_takes_a_product_for_each_example(name):
    features, shapes, how = UNSEEN[name]
    engine, _ = check_layer(lambda: Weighted(shapes, how), features)
    assert engine.general == ()
