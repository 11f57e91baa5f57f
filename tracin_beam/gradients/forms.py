"""The forms in which one backward pass gives every example's weight gradient.

A form holds the gradients of one weight for the B examples of a batch without, where that can be
avoided, writing them out. `Outer` is what dense layers and convolutions give, `Rows` what an
embedding gives, and `Full` is the gradient itself.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf


class Outer(NamedTuple):
    """G_b = Σ_p left[b, p] ⊗ right[b, p], of shape [m, n].

    Attributes:
      left: float32 [B, P, m]; for a dense layer its inputs at P positions.
      right: float32 [B, P, n]; the gradient of the loss with respect to its outputs.
    """

    left: tf.Tensor
    right: tf.Tensor


class Rows(NamedTuple):
    """G_b = Σ_p e(ids[b, p]) ⊗ rows[b, p], of shape [V, n], with e(i) the i-th unit vector.

    Attributes:
      ids: int32 or int64 [B, P], each in [0, V).
      rows: float32 [B, P, n].
    """

    ids: tf.Tensor
    rows: tf.Tensor


class Full(NamedTuple):
    """G_b = value[b], flattened in row-major order.

    Attributes:
      value: float32 [B, N].
    """

    value: tf.Tensor


Form = Outer | Rows | Full


def full(gradient: tf.Tensor) -> Full:
    """Flattens float [B, *shape] to a `Full` of float32 [B, N]."""
    size = math.prod(gradient.shape[1:])
    return Full(tf.reshape(tf.cast(gradient, tf.float32), [-1, size]))


def add(forms: Sequence[Form], shape: Sequence[int]) -> Form:
    """The sum of several gradients of one weight of this shape (a layer called several times)."""
    if len(forms) == 1:
        return forms[0]
    if all(isinstance(form, Outer) for form in forms):
        lefts, rights = zip(*forms, strict=True)
        if len({(a.shape[-1], b.shape[-1]) for a, b in forms}) == 1:
            return Outer(tf.concat(lefts, axis=1), tf.concat(rights, axis=1))
    if all(isinstance(form, Rows) for form in forms):
        ids, rows = zip(*forms, strict=True)
        return Rows(tf.concat([tf.cast(i, tf.int64) for i in ids], axis=1), tf.concat(rows, axis=1))
    return Full(tf.add_n([materialise(form, shape) for form in forms]))


def materialise(form: Form, shape: Sequence[int]) -> tf.Tensor:
    """Writes the gradients out: float32 [B, N], N the product of the weight's shape."""
    size = math.prod(shape)
    match form:
        case Full(value):
            return value
        case Outer(left, right):
            return tf.reshape(tf.matmul(left, right, transpose_a=True), [-1, size])
        case Rows(ids, rows):
            batch = tf.shape(ids, out_type=tf.int64)[0]
            vocabulary = shape[0]
            flat = tf.cast(ids, tf.int64) + tf.range(batch)[:, None] * vocabulary
            width = rows.shape[-1]
            summed = tf.math.unsorted_segment_sum(
                tf.reshape(rows, [-1, width]), tf.reshape(flat, [-1]), batch * vocabulary
            )
            return tf.reshape(summed, [-1, size])


def squared_norm(form: Form) -> tf.Tensor:
    """‖G_b‖² for each example, exact: float32 [B].

    ‖Σ_p a_p ⊗ g_p‖² = Σ_pq (a_p·a_q)(g_p·g_q): the Gram form, or the gradient written out,
    whichever takes fewer multiplications.
    """
    match form:
        case Full(value):
            return _sum_squares(value)
        case Outer(left, right):
            if left.shape[1] == 1:
                return _sum_squares(left[:, 0]) * _sum_squares(right[:, 0])
            if _gram_is_cheaper(form):
                gram = tf.matmul(left, left, transpose_b=True)
                return tf.reduce_sum(gram * tf.matmul(right, right, transpose_b=True), axis=[1, 2])
            return _sum_squares(tf.matmul(left, right, transpose_a=True))
        case Rows(ids, rows):
            same = tf.cast(ids[:, :, None] == ids[:, None, :], rows.dtype)
            return tf.reduce_sum(same * tf.matmul(rows, rows, transpose_b=True), axis=[1, 2])


def for_dot(form: Form, shape: Sequence[int]) -> Form:
    """The form in which inner products with other examples cost least; see `dot`."""
    if isinstance(form, Outer) and not _gram_is_cheaper(form):
        return Full(materialise(form, shape))
    return form


def dot(left: Form, right: Form) -> tf.Tensor:
    """⟨G_b, H_q⟩ for every pair of examples of two batches: float32 [B, Q].

    Both must come from `for_dot` for the same weight, so that they have the same form.
    """
    match left, right:
        case Full(g), Full(h):
            return tf.matmul(g, h, transpose_b=True)
        case Outer(a, g), Outer(b, h):
            if a.shape[1] == 1 and b.shape[1] == 1:
                inputs = tf.matmul(a[:, 0], b[:, 0], transpose_b=True)
                return inputs * tf.matmul(g[:, 0], h[:, 0], transpose_b=True)
            return tf.einsum("bpqr,bpqr->bq", _pairs(a, b), _pairs(g, h))
        case Rows(ids, rows), Rows(other_ids, other_rows):
            # One query at a time, so that memory is B·P·P', not Q times that.
            def one(query: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
                query_ids, query_rows = query
                same = tf.cast(ids[:, :, None] == query_ids[None, None, :], rows.dtype)
                return tf.einsum("bpr,bpn,rn->b", same, rows, query_rows)

            by_query = tf.map_fn(
                one,
                (tf.cast(other_ids, ids.dtype), other_rows),
                fn_output_signature=tf.float32,
                parallel_iterations=2,
            )
            return tf.transpose(by_query)
    raise TypeError(f"no inner product of {type(left).__name__} and {type(right).__name__}")


def _pairs(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    return tf.einsum("bpm,qrm->bpqr", a, b)


def _sum_squares(x: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(tf.square(x), axis=list(range(1, x.shape.rank)))


def _gram_is_cheaper(form: Outer) -> bool:
    # A number of positions that is only known when the data is there is taken as 128.
    positions = form.left.shape[1] or 128
    m, n = form.left.shape[2], form.right.shape[2]
    return bool(positions * (m + n) <= m * n)
