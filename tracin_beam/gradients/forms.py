"""The forms in which one backward pass gives every example's weight gradient.

A form holds the gradients of one weight for the B examples of a batch without, where that can be
avoided, writing them out. `Outer` is what dense layers and convolutions give, `Rows` what an
embedding gives, `Full` is the gradient itself, and `Sum` that of a weight used in several ways.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
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


@dataclasses.dataclass(frozen=True)
class Window:
    """What a convolution's output position sees of its input; an entry for each spatial axis.

    Attributes:
      size, strides, dilations: as in Keras.
      padding: "valid", "same" or "causal".
    """

    size: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    padding: str


class Windowed(NamedTuple):
    """G_b = Σ_p patch(x[b], p) ⊗ right[b, p], of shape [K·C, n]; K positions in the window.

    Attributes:
      x: float32 [B, *spatial, C]; a convolution's input.
      right: float32 [B, P, n]; the gradient with respect to its outputs, in row-major order.
      window: the convolution's window.
    """

    x: tf.Tensor
    right: tf.Tensor
    window: Window

    @property
    def rows(self) -> int:
        """K·C."""
        return math.prod(self.window.size) * int(self.x.shape[-1])


class Split(NamedTuple):
    """A convolution's gradient taken apart, so that ‖G_b‖² can be estimated.

    Attributes:
      mean: float32 [B, C, n], what all K positions in the window have in common: the gradient's
        sum over them, over √K.
      rest: float32 [B, k, n], random combinations of what is left: E‖rest‖² is its squared norm.
    """

    mean: tf.Tensor
    rest: tf.Tensor


Single = Outer | Windowed | Rows | Full


class Sum(NamedTuple):
    """G_b = Σ of the parts' gradients, which are all of one shape [m, n].

    Attributes:
      parts: at least two forms, at most one of each type; see `add`.
    """

    parts: tuple[Single, ...]


Form = Single | Sum


def parts_of(form: Form) -> tuple[Single, ...]:
    """What a sum adds up, or the form by itself."""
    return form.parts if isinstance(form, Sum) else (form,)


def specs(form: Any) -> Any:
    """The form with `tf.TensorSpec`s in place of its tensors."""
    return tf.nest.map_structure(
        lambda x: tf.TensorSpec(x.shape, x.dtype) if tf.is_tensor(x) else x, form
    )


def matrix_shape(form: Form, shape: Sequence[int]) -> tuple[int, int]:
    """(m, n): as what matrix a gradient of a weight of this shape is seen."""
    for part in parts_of(form):
        if isinstance(part, Outer):
            return int(part.left.shape[-1]), int(part.right.shape[-1])
    size = math.prod(shape)
    if any(isinstance(part, Rows) for part in parts_of(form)):
        return int(shape[0]), size // int(shape[0])
    return (size // int(shape[-1]), int(shape[-1])) if len(shape) > 1 else (size, 1)


def full(gradient: tf.Tensor) -> Full:
    """Flattens float [B, *shape] to a `Full` of float32 [B, N]."""
    size = math.prod(gradient.shape[1:])
    return Full(tf.reshape(tf.cast(gradient, tf.float32), [-1, size]))


def add(forms: Sequence[Form], shape: Sequence[int]) -> Form:
    """The sum of several gradients of one weight of this shape, as when a layer is called twice.

    Outer products of one shape stay factors, and rows of an embedding rows; where both occur, as
    in a matrix that looks tokens up and scores them, the result is a `Sum`. Only what does not go
    together as matrices of one shape is written out.
    """
    if len(forms) == 1:
        return forms[0]
    parts = [part for form in forms for part in parts_of(form)]
    outer = [part for part in parts if isinstance(part, Outer)]
    rows = [part for part in parts if isinstance(part, Rows)]
    written: list[Single] = [part for part in parts if not isinstance(part, Outer | Rows)]
    shapes = {(form.left.shape[-1], form.right.shape[-1]) for form in outer}
    if rows:
        shapes.add((shape[0], math.prod(shape) // shape[0]))
    if len(shapes) > 1:
        outer, rows, written = [], [], parts
    found: list[Single] = []
    if outer:
        lefts, rights = zip(*outer, strict=True)
        found.append(
            outer[0]
            if len(outer) == 1
            else Outer(tf.concat(lefts, axis=1), tf.concat(rights, axis=1))
        )
    if rows:
        ids, values = zip(*rows, strict=True)
        if len(rows) > 1:
            same = len({i.dtype for i in ids}) == 1
            joined = tf.concat([i if same else tf.cast(i, tf.int64) for i in ids], axis=1)
            rows = [Rows(joined, tf.concat(values, axis=1))]
        found.append(rows[0])
    if written:
        found.append(Full(tf.add_n([materialise(part, shape) for part in written])))
    return found[0] if len(found) == 1 else Sum(tuple(found))


def materialise(form: Form, shape: Sequence[int]) -> tf.Tensor:
    """Writes the gradients out: float32 [B, N], N the product of the weight's shape."""
    size = math.prod(shape)
    match form:
        case Sum(parts):
            return tf.add_n([materialise(part, shape) for part in parts])
        case Full(value):
            return value
        case Outer(left, right):
            return tf.reshape(tf.matmul(left, right, transpose_a=True), [-1, size])
        case Windowed(x, right, window):
            # Quicker by a product for each position in the window than by patches side by side.
            products = [tf.matmul(part, right, transpose_a=True) for part in slices(x, window)]
            return tf.reshape(tf.concat(products, axis=1), [-1, size])
        case Rows(ids, rows):
            batch = tf.shape(ids, out_type=tf.int64)[0]
            vocabulary = shape[0]
            flat = tf.cast(ids, tf.int64) + tf.range(batch)[:, None] * vocabulary
            width = rows.shape[-1]
            summed = tf.math.unsorted_segment_sum(
                tf.reshape(rows, [-1, width]), tf.reshape(flat, [-1]), batch * vocabulary
            )
            return tf.reshape(summed, [-1, size])


def keeps_its_form(form: Form) -> bool:
    """Whether a gradient that is multiplied number by number is still of its form; see `scaled`."""
    return all(isinstance(part, Rows | Full) for part in parts_of(form))


def scaled(form: Form, scale: tf.Tensor, shape: Sequence[int]) -> Form:
    """The gradients of a weight of this shape, multiplied number by number with float32 [*shape].

    Rows of an embedding stay rows, and what is written out stays so. Factors do not: their product
    with a matrix has none, so that it is written out.
    """
    if not keeps_its_form(form):
        return Full(materialise(form, shape) * tf.reshape(scale, [-1]))
    found: list[Single] = []
    for part in parts_of(form):
        if isinstance(part, Rows):
            matrix = tf.reshape(scale, [shape[0], -1])
            found.append(Rows(part.ids, part.rows * tf.gather(matrix, part.ids)))
        elif isinstance(part, Full):
            found.append(Full(part.value * tf.reshape(scale, [-1])))
    return Sum(tuple(found)) if isinstance(form, Sum) else found[0]


def squared_norm(form: Form) -> tf.Tensor:
    """‖G_b‖² for each example, exact: float32 [B].

    ‖Σ_p a_p ⊗ g_p‖² = Σ_pq (a_p·a_q)(g_p·g_q): the Gram form, or the gradient written out,
    whichever takes fewer multiplications. For a sum the products of its parts are added.
    """
    match form:
        case Sum(parts):
            norms = [squared_norm(part) for part in parts]
            pairs = itertools.combinations(parts, 2)
            return tf.add_n([*norms, *(2 * _inner(left, right) for left, right in pairs)])
        case Full(value):
            return _sum_squares(value)
        case Outer(left, right):
            if left.shape[1] == 1:
                return _sum_squares(left[:, 0]) * _sum_squares(right[:, 0])
            if gram_is_cheaper(form):
                gram = tf.matmul(left, left, transpose_b=True)
                return tf.reduce_sum(gram * tf.matmul(right, right, transpose_b=True), axis=[1, 2])
            return _sum_squares(tf.matmul(left, right, transpose_a=True))
        case Windowed(x, right, window):
            if gram_is_cheaper(form):
                gram = _gram_of_patches(x, window)
                return tf.reduce_sum(gram * tf.matmul(right, right, transpose_b=True), axis=[1, 2])
            seen = slices(x, window)
            products = [tf.matmul(part, right, transpose_a=True) for part in seen]
            return tf.add_n([_sum_squares(product) for product in products])
        case Rows(ids, rows):
            same = tf.cast(ids[:, :, None] == ids[:, None, :], rows.dtype)
            return tf.reduce_sum(same * tf.matmul(rows, rows, transpose_b=True), axis=[1, 2])


def summed_norm(gradients: Sequence[Form]) -> tf.Tensor:
    """‖∇ℓ‖² for each example, of all weights together: float32 [B]."""
    written = [form.value for form in gradients if isinstance(form, Full)]
    norms = [squared_norm(form) for form in gradients if not isinstance(form, Full)]
    if written:  # side by side, as most of them are biases and the like
        norms.append(_sum_squares(tf.concat(written, axis=1)))
    return tf.add_n(norms)


def estimated_norm(gradients: Sequence[Form | Split]) -> tuple[tf.Tensor, tf.Tensor]:
    """‖∇ℓ‖² for each example, unbiased, and its standard error: float32 [B] each.

    Only the combinations of what is left of a `Split` are random. They are drawn independently of
    one another, so that how their squared norms differ tells how far their sum may be off; and
    independently for each weight, so that variances add up.
    """
    split = [form for form in gradients if isinstance(form, Split)]
    norms = [_sum_squares(form.mean) for form in split]
    variances = []
    for form in split:
        each = tf.reduce_sum(tf.square(form.rest), axis=2)
        count = int(each.shape[1])
        norms.append(tf.reduce_sum(each, axis=1))
        variances.append(tf.math.reduce_variance(each, axis=1) * (count**2 / (count - 1)))
    others = [form for form in gradients if not isinstance(form, Split)]
    norm = tf.add_n([*norms, summed_norm(others)] if others else norms)
    return norm, tf.sqrt(tf.add_n(variances)) if variances else tf.zeros_like(norm)


def _inner(left: Form, right: Form) -> tf.Tensor:
    """⟨G_b, H_b⟩ of each example, of two different forms: float32 [B]."""
    match left, right:
        case Outer(a, g), Rows(ids, rows):
            # [B, P, Q] of the Q rows' ids and of the P outer products.
            inputs = _columns(a, ids)
            return tf.reduce_sum(inputs * tf.matmul(g, rows, transpose_b=True), axis=[1, 2])
        case Full(value), Outer(a, g):
            matrix = tf.reshape(value, [-1, a.shape[-1], g.shape[-1]])
            return tf.reduce_sum(tf.matmul(a, matrix) * g, axis=[1, 2])
        case Full(value), Rows(ids, rows):
            matrix = tf.reshape(value, [tf.shape(ids)[0], -1, rows.shape[-1]])
            return tf.reduce_sum(tf.gather(matrix, ids, batch_dims=1) * rows, axis=[1, 2])
        case (Rows(), Outer()) | ((Outer() | Rows()), Full()):
            return _inner(right, left)
    raise TypeError(f"no inner product of {type(left).__name__} and {type(right).__name__}")


def _columns(a: tf.Tensor, ids: tf.Tensor) -> tf.Tensor:
    """a[b, p, ids[b, q]]: [B, P, Q] of [B, P, V] and [B, Q]."""
    return tf.transpose(tf.gather(tf.transpose(a, [0, 2, 1]), ids, batch_dims=1), [0, 2, 1])


def for_dot(form: Form, shape: Sequence[int]) -> Form:
    """The form in which inner products with other examples cost least; see `dot`."""
    if isinstance(form, Sum):
        if any(isinstance(for_dot(part, shape), Full) for part in form.parts):
            return Full(materialise(form, shape))
        return form
    if isinstance(form, Windowed) or (isinstance(form, Outer) and form.left.shape[1] != 1):
        return Full(materialise(form, shape))
    return form


def dot(left: Form, right: Form) -> tf.Tensor:
    """⟨G_b, H_q⟩ for every pair of examples of two batches: float32 [B, Q].

    Both must come from `for_dot` for the same weight, so that they have the same form.
    """
    match left, right:
        case Full(g), Full(h):
            return tf.matmul(g, h, transpose_b=True)
        case Outer(a, g), Outer(b, h):  # of one position
            inputs = tf.matmul(a[:, 0], b[:, 0], transpose_b=True)
            return inputs * tf.matmul(g[:, 0], h[:, 0], transpose_b=True)
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
        case Outer(a, g), Rows(ids, rows):  # of one position
            inputs = tf.gather(a[:, 0], ids, axis=1)
            return tf.einsum("bqp,bn,qpn->bq", inputs, g[:, 0], rows)
        case Rows(), Outer():
            return tf.transpose(dot(right, left))
        case Sum(lefts), Sum(rights):
            return tf.add_n([dot(one, other) for one in lefts for other in rights])
    raise TypeError(f"no inner product of {type(left).__name__} and {type(right).__name__}")


def dot_written(form: Form, queries: tf.Tensor | Outer, shape: Sequence[int]) -> tf.Tensor:
    """⟨G_b, H_q⟩ for every pair of an example and a transformed query: float32 [B, Q].

    Args:
      form: of B examples.
      queries: float32 [Q, N], written out; or sums of outer products, for examples that are one.
      shape: of the weight whose gradients these are.
    """
    ready = for_dot(form, shape)
    match ready, queries:
        case Outer(left, right), Outer(others_left, others_right):
            count, terms = tf.unstack(tf.shape(others_left)[:2])
            products = [
                tf.matmul(own[:, 0], tf.reshape(other, [-1, own.shape[-1]]), transpose_b=True)
                for own, other in ((left, others_left), (right, others_right))
            ]
            return tf.reduce_sum(tf.reshape(products[0] * products[1], [-1, count, terms]), axis=2)
        case Full(value), _:
            return tf.matmul(value, queries, transpose_b=True)
        case Outer(left, right), _:  # of one position
            # One product with all queries side by side, then a row of it for each of them.
            m, n = left.shape[-1], right.shape[-1]
            beside = tf.transpose(tf.reshape(queries, [-1, m, n]), [1, 0, 2])
            rows = tf.matmul(left[:, 0], tf.reshape(beside, [m, -1]))
            rows = tf.reshape(rows, [-1, tf.shape(queries)[0], n])
            return tf.matmul(rows, tf.transpose(right, [0, 2, 1]))[..., 0]
        case _:
            by_query = tf.map_fn(
                lambda query: dot_vector(ready, query, shape), queries, parallel_iterations=2
            )
            return tf.transpose(by_query)


def moments(
    form: Form, counted: tf.Tensor, shape: Sequence[int], widest: int, bias: bool = False
) -> dict[str, tf.Tensor]:
    """Sums over a batch of the second moments that K-FAC takes of a weight's gradient.

    For G_b = Σ_p left[b, p] ⊗ right[b, p] with P positions they are A = Σ_b Σ_p left leftᵀ and
    B = Σ_b (1/P) Σ_p right rightᵀ, so that A ⊗ B is the second moment of G_b where positions are
    alike and their output gradients uncorrelated (Grosse and Martens 2016, KFC, theorem 1; "expand"
    of Eschenhagen et al. 2023). With one position it is K-FAC as Martens and Grosse 2015 have it.
    Of any other form they are the squares of the gradient's entries.

    Args:
      form: of B examples.
      counted: float32 [B], 1 for an example that counts and 0 for padding.
      shape: of the weight.
      widest: the widest side whose second moments are taken; of a wider one its squares.
      bias: whether left has a one more at every position, whose gradient is that of the bias.

    Returns:
      "A" [m, m] or [m] and "B" [n, n] or [n], or "diagonal" [N]: float32.
    """

    def moment(x: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
        flat = tf.reshape(x * weights, [-1, x.shape[-1]])
        if x.shape[-1] > widest:
            return tf.reduce_sum(tf.square(flat), axis=0)
        return tf.matmul(flat, flat, transpose_a=True)

    def with_one(left: tf.Tensor) -> tf.Tensor:
        return tf.concat([left, tf.ones_like(left[..., :1])], axis=-1) if bias else left

    match form:
        case Outer(left, right):
            root = tf.sqrt(counted)[:, None, None]
            positions = tf.cast(tf.shape(right)[1], tf.float32)
            return {
                "A": moment(with_one(left), root),
                "B": moment(right, root / tf.sqrt(positions)),
            }
        case Windowed(x, right, window):
            root = tf.sqrt(counted)[:, None, None]
            positions = tf.cast(tf.shape(right)[1], tf.float32)
            size = form.rows + bias

            def with_next(total: tf.Tensor, one: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
                # Patches are as many times the input as a window has positions: never all at once.
                patches = tf.concat(slices(one[0][None], window), axis=-1)
                return total + moment(with_one(patches), one[1])

            zeros = tf.zeros([size] if size > widest else [size, size])
            left = tf.foldl(with_next, (x, root), initializer=zeros)
            return {"A": left, "B": moment(right, root / tf.sqrt(positions))}
        case Rows(ids, rows):
            examples = tf.range(tf.shape(ids, out_type=tf.int64)[0])[:, None]
            places = tf.cast(ids, tf.int64) + examples * shape[0]
            unique, place = tf.unique(tf.reshape(places, [-1]))
            weighted = tf.reshape(rows * counted[:, None, None], [-1, rows.shape[-1]])
            # An example may look a row up several times: its gradient is the sum.
            each = tf.math.unsorted_segment_sum(weighted, place, tf.size(unique))
            squares = tf.math.unsorted_segment_sum(tf.square(each), unique % shape[0], shape[0])
            return {"diagonal": tf.reshape(squares, [-1])}
        case _:
            squares = tf.square(materialise(form, shape))
            return {"diagonal": tf.linalg.matvec(squares, counted, transpose_a=True)}


def quadratic(
    form: Form,
    shape: Sequence[int],
    by: tf.Tensor,
    left: tf.Tensor | None,
    right: tf.Tensor | None,
    bias: bool,
) -> tf.Tensor:
    """Σ by ∘ (leftᵀ G_b right)², of matrices G_b [m, n]: float32 [B].

    Args:
      form: of B examples; of factors, where `by` is a matrix.
      shape: of the weight.
      by: float32 [m, n], or [N] of a gradient without factors.
      left, right: float32 [m, m] and [n, n]; None for the identity.
      bias: whether the last of the m rows is the gradient of the bias.
    """
    if not isinstance(form, Outer | Windowed) or by.shape.rank == 1:
        return tf.linalg.matvec(tf.square(materialise(form, shape)), by)
    if left is None:
        left = tf.eye(by.shape[0])
    inner = by.shape[0] - bias
    rows, columns = project_left(form, left[:inner]), form.right
    rows = rows + left[inner] if bias else rows
    columns = columns if right is None else tf.tensordot(columns, right, 1)
    if columns.shape[1] == 1:
        squares = tf.matmul(tf.square(rows[:, 0]), by) * tf.square(columns[:, 0])
        return tf.reduce_sum(squares, axis=1)
    return tf.reduce_sum(by * tf.square(tf.matmul(rows, columns, transpose_a=True)), axis=[1, 2])


def total(form: Form, weights: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
    """Σ_b weights[b] G_b, flattened: float32 [N].

    Args:
      form: of B examples.
      weights: float32 [B].
      shape: of the weight whose gradients these are.
    """
    match form:
        case Outer(left, right):
            summed = tf.einsum("b,bpm,bpn->mn", weights, left, right)
            return tf.reshape(summed, [-1])
        case Rows(ids, rows):
            width = rows.shape[-1]
            weighted = tf.reshape(rows * weights[:, None, None], [-1, width])
            flat = tf.reshape(ids, [-1])
            return tf.reshape(tf.math.unsorted_segment_sum(weighted, flat, shape[0]), [-1])
        case Sum(parts):
            return tf.add_n([total(part, weights, shape) for part in parts])
        case _:
            return tf.linalg.matvec(materialise(form, shape), weights, transpose_a=True)


def dot_vector(form: Form, vector: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
    """⟨G_b, vector⟩ for each example, nothing written out where that can be avoided: float32 [B].

    Args:
      form: of B examples.
      vector: float32 [N].
      shape: of the weight whose gradients these are.
    """
    match form:
        case Outer() | Windowed():
            matrix = tf.reshape(vector, [-1, form.right.shape[-1]])
            return tf.reduce_sum(project_left(form, matrix) * form.right, axis=[1, 2])
        case Rows(ids, rows):
            matrix = tf.reshape(vector, [shape[0], -1])
            return tf.reduce_sum(tf.gather(matrix, ids) * rows, axis=[1, 2])
        case Sum(parts):
            return tf.add_n([dot_vector(part, vector, shape) for part in parts])
        case _:
            return tf.linalg.matvec(materialise(form, shape), vector)


def project_left(form: Outer | Windowed, matrix: tf.Tensor) -> tf.Tensor:
    """The left factors times a matrix [m, k]: float32 [B, P, k]. For a window, a convolution."""
    if isinstance(form, Outer):
        return tf.tensordot(form.left, matrix, 1)
    x, window = form.x, form.window
    filters = tf.reshape(matrix, [*window.size, x.shape[-1], matrix.shape[-1]])
    padding = window.padding
    if padding == "causal":
        span = window.dilations[0] * (window.size[0] - 1)
        x, padding = tf.pad(x, [[0, 0], [span, 0], [0, 0]]), "valid"
    projected = keras.ops.conv(
        x, filters, window.strides, padding, "channels_last", window.dilations
    )
    return tf.reshape(projected, [x.shape[0], -1, matrix.shape[-1]])


def window_mean(form: Windowed) -> tf.Tensor:
    """What each output position sees, summed over the K positions in the window, over √K.

    Of a window without dilations: float32 [B, P, C].
    """
    x, window = form.x, form.window
    paddings, _ = _paddings(x, window)
    size, strides = [1, *window.size, 1], [1, *window.strides, 1]
    mean = tf.nn.avg_pool(tf.pad(x, [[0, 0], *paddings, [0, 0]]), size, strides, "VALID")
    return tf.reshape(mean * math.sqrt(math.prod(window.size)), [x.shape[0], -1, x.shape[-1]])


def slices(x: tf.Tensor, window: Window) -> list[tf.Tensor]:
    """What each output position of a convolution sees at each position in its window.

    Args:
      x: float32 [B, *spatial, C].
      window: K positions.

    Returns:
      K tensors [B, P, C], in row-major order, as P is.

    Raises:
      NotImplementedError: a padding that is not known.
    """
    rank = len(window.size)
    paddings, counts = _paddings(x, window)
    positions = math.prod(counts) if all(isinstance(n, int) for n in counts) else -1
    stride = window.strides[0]
    phases = rank < 3 and stride > 1 and set(window.strides) == {stride} and positions > 0
    if phases:
        # Slices with strides take several times as long as those without.
        for i in range(rank):
            paddings[i][1] += -(x.shape[1 + i] + sum(paddings[i])) % stride
    padded = tf.pad(x, [[0, 0], *paddings, [0, 0]])
    if phases:
        padded = _phases(padded, stride)
    channels = x.shape[-1]
    parts = []
    for offsets in itertools.product(*map(range, window.size)):
        begins = [o * d for o, d in zip(offsets, window.dilations, strict=True)]
        if phases:
            phase = 0
            for begin in begins:
                phase = phase * stride + begin % stride
            firsts = [begin // stride for begin in begins]
            own = [slice(f, f + count) for f, count in zip(firsts, counts, strict=True)]
            part = padded[(slice(None), *own, slice(phase * channels, (phase + 1) * channels))]
            parts.append(tf.reshape(part, [x.shape[0], positions, channels]))
            continue
        places = [
            slice(begin, begin + (count - 1) * stride + 1, stride)
            for begin, count, stride in zip(begins, counts, window.strides, strict=True)
        ]
        part = padded[(slice(None), *places)]
        parts.append(tf.reshape(part, [x.shape[0], positions, x.shape[-1]]))
    return parts


def _paddings(x: tf.Tensor, window: Window) -> tuple[list[list[Any]], list[Any]]:
    """By spatial axis: zeros before and after, and output positions; tensors where not known."""
    shape = tf.shape(x)
    paddings: list[list[Any]] = []
    counts: list[Any] = []
    for i in range(len(window.size)):
        size = x.shape[1 + i] or shape[1 + i]
        stride = window.strides[i]
        span = window.dilations[i] * (window.size[i] - 1) + 1
        if window.padding == "same":
            count = -(-size // stride)
            total = _at_least_zero((count - 1) * stride + span - size)
            paddings.append([total // 2, total - total // 2])
        elif window.padding == "causal":
            count = -(-size // stride)
            paddings.append([span - 1, 0])
        elif window.padding == "valid":
            count = (size - span) // stride + 1
            paddings.append([0, 0])
        else:
            raise NotImplementedError(f"padding={window.padding}")
        counts.append(count)
    return paddings, counts


def _phases(x: tf.Tensor, stride: int) -> tf.Tensor:
    """Positions that are a stride apart next to one another, the others as further channels."""
    if x.shape.rank == 4:
        return tf.nn.space_to_depth(x, stride)
    return tf.reshape(x, [-1, x.shape[1] // stride, stride * x.shape[2]])


def depthwise(x: tf.Tensor, right: tf.Tensor, window: Window, multiplier: int) -> tf.Tensor:
    """∂ℓ_b/∂K of a depthwise convolution: float32 [B, K, C, M], K positions in the window.

    Args:
      x: float32 [B, *spatial, C].
      right: float32 [B, P, C·M], the gradient with respect to its outputs.
      window: the convolution's window.
      multiplier: M.
    """
    batch, channels = x.shape[0], x.shape[-1]
    known = x.shape[1:-1].is_fully_defined() and window.padding in ("same", "valid")
    if multiplier == 1 and known and window.dilations == (1, 1) and x.shape.rank == 4:
        return _correlated(x, right, window)
    outputs = tf.reshape(right, [batch, -1, channels, multiplier])
    parts = [tf.einsum("bpc,bpcm->bcm", part, outputs) for part in slices(x, window)]
    return tf.stack(parts, axis=1)


def grouped(x: tf.Tensor, right: tf.Tensor, window: Window, groups: int) -> tf.Tensor:
    """∂ℓ_b/∂K of a convolution in groups of channels: float32 [B, K, C / groups, n].

    Args:
      x: float32 [B, *spatial, C].
      right: float32 [B, P, n], the gradient with respect to its outputs.
      window: K positions.
      groups: how many.
    """
    batch, channels = x.shape[0], x.shape[-1] // groups
    outputs = tf.reshape(right, [batch, -1, groups, right.shape[-1] // groups])
    gradients = [
        tf.einsum("bpgc,bpgn->bcgn", tf.reshape(part, [batch, -1, groups, channels]), outputs)
        for part in slices(x, window)
    ]
    return tf.stack(gradients, axis=1)


def _correlated(x: tf.Tensor, right: tf.Tensor, window: Window) -> tf.Tensor:
    """By one convolution with all examples' channels side by side, and the gradients as filter."""
    batch, channels = x.shape[0], x.shape[-1]
    paddings, counts, spans = [], [], []
    for length, size, stride in zip(x.shape[1:3], window.size, window.strides, strict=True):
        same = window.padding == "same"
        count = -(-length // stride) if same else (length - size) // stride + 1
        span = (count - 1) * stride + size
        total = max(span - length, 0)
        paddings.append([total // 2, total - total // 2])
        counts.append(count)
        spans.append(span)
    x = tf.pad(x, [[0, 0], *paddings, [0, 0]])[:, : spans[0], : spans[1]]
    x = tf.reshape(tf.transpose(x, [1, 2, 0, 3]), [1, *spans, batch * channels])
    right = tf.reshape(right, [batch, *counts, channels])
    filters = tf.reshape(tf.transpose(right, [1, 2, 0, 3]), [*counts, batch * channels, 1])
    found = tf.nn.depthwise_conv2d(x, filters, [1, 1, 1, 1], "VALID", dilations=window.strides)
    found = tf.reshape(found, [math.prod(window.size), batch, channels, 1])
    return tf.transpose(found, [1, 0, 2, 3])


def _at_least_zero(n: Any) -> Any:
    return max(n, 0) if isinstance(n, int) else tf.maximum(n, 0)


def _sum_squares(x: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(tf.square(x), axis=list(range(1, x.shape.rank)))


def gram_is_cheaper(form: Outer | Windowed) -> bool:
    """Whether inner products of positions take fewer multiplications than the gradient."""
    # A number of positions that is only known when the data is there is taken as 128.
    positions = form.right.shape[1] or 128
    m = form.rows if isinstance(form, Windowed) else form.left.shape[2]
    n = form.right.shape[2]
    return bool(positions * (m + n) <= m * n)


def _gram_of_patches(x: tf.Tensor, window: Window) -> tf.Tensor:
    """Inner products of what the output positions see: float32 [B, P, P]."""
    patches = tf.concat(slices(x, window), axis=2)
    return tf.matmul(patches, patches, transpose_b=True)
