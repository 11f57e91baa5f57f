"""What weights go through before they meet the examples, and what their gradients go back through.

Such an operation is linear in the gradient and passes each example's on: as factors where it can,
written out and by the operation's own gradient function where not.

To add an operation, write a function and put `@passage("ItsType")` on it.
"""

import math
from collections.abc import Callable, Sequence

import tensorflow as tf

from tracin_beam.gradients import forms, general
from tracin_beam.gradients.forms import Form, Full, Outer, Rows, Windowed

# Operations whose rules tell the two apart when both operands are the same weight.
_TWICE = {"AddV2", "Add", "Sub", "AddN"}


class Unknown(Exception):
    """An operation, or a use of it, that no rule here is for."""


Passage = Callable[[tf.Operation, int, Form], Form]

_PASSAGES: dict[str, Passage] = {}


def passage(*types: str) -> Callable[[Passage], Passage]:
    """Registers what operations do with gradients: (operation, which input, of its output)."""

    def register(function: Passage) -> Passage:
        _PASSAGES.update(dict.fromkeys(types, function))
        return function

    return register


def back(operation: tf.Operation, i: int, parts: Sequence[Form], output: tf.Tensor) -> list[Form]:
    """The gradient with respect to the i-th input, as parts of a sum, given the output's.

    Raises:
      Unknown: there is no way to find it.
    """
    again = any(operation.inputs[j] is operation.inputs[i] for j in range(i))
    if again and operation.type not in _TWICE:
        return []  # the operation's own gradient function has given both places' together
    if len(parts) > 1 and output.shape.is_fully_defined():
        parts = forms.parts_of(forms.add(parts, output.shape))
    function = _PASSAGES.get(operation.type)
    if function is None:
        return [_transposed_jacobian(operation, i, part, output) for part in parts]
    return [function(operation, i, part) for part in parts]


def _transposed_jacobian(operation: tf.Operation, i: int, form: Form, output: tf.Tensor) -> Full:
    """Through any operation: its own gradient function, for each example's gradient."""
    x = operation.inputs[i]
    if any(y is x for j, y in enumerate(operation.inputs) if j != i) and operation.type in _TWICE:
        raise Unknown(operation.type)
    value = written(form, output)
    graph = tf.compat.v1.get_default_graph()
    before = graph.version

    def one(g: tf.Tensor) -> tf.Tensor:
        (gradient,) = tf.gradients(
            output, [x], [tf.cast(g, output.dtype)], stop_gradients=list(operation.inputs)
        )
        if gradient is None:
            return tf.zeros(tf.shape(x))
        return tf.cast(tf.convert_to_tensor(gradient), tf.float32)

    try:
        result = tf.vectorized_map(one, value)
    except Exception as error:  # its converters fail in many ways
        raise Unknown(operation.type) from error
    new = [o for o in graph.get_operations() if o._id > before + 1]
    if general.unsafe_products(new):
        raise Unknown(operation.type)
    return flattened(result, x)


def written(form: Form, x: tf.Tensor) -> tf.Tensor:
    """A gradient with respect to x written out: [B, *x.shape]."""
    value = form.value if isinstance(form, Full) else forms.materialise(form, x.shape)
    if x.shape.is_fully_defined():
        return tf.reshape(value, [tf.nest.flatten(form)[0].shape[0] or -1, *x.shape])
    return tf.reshape(value, tf.concat([tf.shape(value)[:1], tf.shape(x)], axis=0))


def flattened(value: tf.Tensor, x: tf.Tensor) -> Full:
    """A gradient with respect to x, [B, *x.shape], as a form."""
    size = math.prod(x.shape) if x.shape.is_fully_defined() else -1
    batch = value.shape[0] if value.shape[0] is not None else tf.shape(value)[0]
    return Full(tf.reshape(tf.cast(value, tf.float32), [batch, size]))


@passage("Identity", "Cast", "Snapshot", "EnsureShape", "CheckNumerics")
def _same(operation: tf.Operation, i: int, form: Form) -> Form:
    del operation, i
    return form


@passage("Reshape", "ExpandDims", "Squeeze")
def _reshaped(operation: tf.Operation, i: int, form: Form) -> Form:
    """Flattened, a gradient stays what it is; only rows need their axis."""
    x, y = operation.inputs[i], operation.outputs[0]
    if isinstance(form, Rows) and x.shape[:1] != y.shape[:1]:
        return flattened(written(form, y), x)
    return form


@passage("Neg")
def _negative(operation: tf.Operation, i: int, form: Form) -> Form:
    del operation, i
    return _scaled(form, tf.constant(-1.0))


@passage("AddV2", "Add", "Sub", "AddN", "BiasAdd", "BroadcastTo", "Tile")
def _added(operation: tf.Operation, i: int, form: Form) -> Form:
    x, y = operation.inputs[i], operation.outputs[0]
    if x.shape.is_fully_defined() and x.shape == y.shape and operation.type != "Tile":
        return _negative(operation, i, form) if operation.type == "Sub" and i == 1 else form
    return _transposed_jacobian(operation, i, form, y)


@passage("Mul", "RealDiv")
def _multiplied(operation: tf.Operation, i: int, form: Form) -> Form:
    """By other weights or a constant: factors stay factors where the other one is of rank one."""
    x, y = operation.inputs[i], operation.outputs[0]
    if operation.inputs[1 - i] is x:
        return _transposed_jacobian(operation, i, form, y)
    other = tf.cast(operation.inputs[1 - i], tf.float32)
    if operation.type == "RealDiv":
        if i == 1:
            return _transposed_jacobian(operation, i, form, y)
        other = 1.0 / other
    if not isinstance(form, Full) and x.shape.is_fully_defined() and x.shape == y.shape:
        size = math.prod(other.shape) if other.shape.is_fully_defined() else None
        if size == 1:
            return _scaled(form, tf.reshape(other, []))
        right_width = form.rows.shape[-1] if isinstance(form, Rows) else None
        if isinstance(form, Outer):
            right_width = form.right.shape[-1]
            leading = int(x.shape[0])
            if other.shape[:1] == [leading] == [form.left.shape[-1]] and size == leading:
                return Outer(form.left * tf.reshape(other, [-1]), form.right)
        if size == right_width and other.shape[-1:] == [right_width] == x.shape[-1:]:
            return _scaled(form, tf.reshape(other, [-1]))
    if isinstance(form, Outer) and x.shape != y.shape and x.shape.is_fully_defined():
        # The other operand is the matrix and this one scales its columns or all of it.
        m, n = form.left.shape[-1], form.right.shape[-1]
        if other.shape == y.shape and y.shape == [m, n]:
            columns = tf.reduce_sum(tf.matmul(form.left, _tiled(other, form)) * form.right, axis=1)
            if math.prod(x.shape) == n and x.shape[-1:] == [n]:
                return Full(columns)
            if math.prod(x.shape) == 1:
                return Full(tf.reduce_sum(columns, axis=1, keepdims=True))
    return _transposed_jacobian(operation, i, form, y)


def _tiled(matrix: tf.Tensor, form: Outer) -> tf.Tensor:
    return tf.broadcast_to(matrix, [form.left.shape[0] or tf.shape(form.left)[0], *matrix.shape])


def _scaled(form: Form, factor: tf.Tensor) -> Form:
    """The gradient times a number, or its last axis times a vector."""
    match form:
        case Full(value):
            return Full(value * factor)
        case Rows(ids, rows):
            return Rows(ids, rows * factor)
        case Outer(left, right):
            return Outer(left, right * factor)
        case Windowed(x, right, window):
            return Windowed(x, right * factor, window)
    return forms.Sum(tuple(_scaled(part, factor) for part in form.parts))  # type: ignore[misc]


@passage("Transpose")
def _transposed(operation: tf.Operation, i: int, form: Form) -> Form:
    """Factors change sides if the axes of one are all put before those of the other."""
    x, y = operation.inputs[i], operation.outputs[0]
    order = tf.get_static_value(operation.inputs[1])
    if order is None:
        return _transposed_jacobian(operation, i, form, y)
    if isinstance(form, Outer) and y.shape.is_fully_defined():
        rank = len(order)
        for split in range(1, rank):
            if math.prod(y.shape[:split]) == form.left.shape[-1]:
                left, right = list(order[:split]), list(order[split:])
                if left == sorted(left) and right == sorted(right):
                    if max(left) < min(right):
                        return form
                    if max(right) < min(left):
                        return Outer(form.right, form.left)
    inverse = sorted(range(len(order)), key=lambda a: order[a])
    value = tf.transpose(written(form, y), [0, *(1 + a for a in inverse)])
    return flattened(value, x)


@passage("MatMul")
def _of_product(operation: tf.Operation, i: int, form: Form) -> Form:
    """U = V W of weights, as low-rank factors are: G_V = G_U Wᵀ and G_W = Vᵀ G_U."""
    turned = operation.get_attr("transpose_a") or operation.get_attr("transpose_b")
    other = tf.cast(operation.inputs[1 - i], tf.float32)
    if not turned and operation.inputs[0] is not operation.inputs[1]:
        match form:
            case Outer(left, right) if right.shape[-1] == operation.outputs[0].shape[-1]:
                if i == 0:
                    return Outer(left, tf.tensordot(right, other, [[-1], [1]]))
                return Outer(tf.tensordot(left, other, [[-1], [0]]), right)
            case Rows(ids, rows):
                if i == 0:
                    return Rows(ids, tf.tensordot(rows, other, [[-1], [1]]))
                return Outer(tf.gather(other, ids), rows)
    return _transposed_jacobian(operation, i, form, operation.outputs[0])


@passage("GatherV2")
def _looked_up(operation: tf.Operation, i: int, form: Form) -> Form:
    """Rows of a table that all examples look up, as positions are."""
    x, y = operation.inputs[i], operation.outputs[0]
    axis = tf.get_static_value(operation.inputs[2])
    if axis != 0 or operation.get_attr("batch_dims") or not isinstance(form, Full):
        return _transposed_jacobian(operation, i, form, y)
    value = written(form, y)
    ids = tf.reshape(operation.inputs[1], [1, -1])
    batch = value.shape[0]
    width = math.prod(x.shape[1:])
    return Rows(tf.repeat(ids, batch, axis=0), tf.reshape(value, [batch, -1, width]))


@passage("StridedSlice", "Slice")
def _sliced(operation: tf.Operation, i: int, form: Form) -> Form:
    """A slice of whole rows from the first on, as of position embeddings; else by its gradient."""
    x, y = operation.inputs[i], operation.outputs[0]
    value = written(form, y)
    if x.shape.is_fully_defined() and x.shape.rank == y.shape.rank:
        first = _first_of_slice(operation)
        if first is not None:
            sizes = [y.shape[a] or tf.shape(y)[a] for a in range(x.shape.rank)]
            after = [x.shape[a] - first[a] - sizes[a] for a in range(x.shape.rank)]
            pads = [[0, 0], *([first[a], after[a]] for a in range(x.shape.rank))]
            value = tf.pad(value, pads)
            return flattened(tf.ensure_shape(value, [value.shape[0], *x.shape]), x)
    return _transposed_jacobian(operation, i, Full(tf.reshape(value, [value.shape[0], -1])), y)


def _first_of_slice(operation: tf.Operation) -> list[int] | None:
    """Where a slice begins along each axis, if it takes what follows without gaps."""
    rank = operation.inputs[0].shape.rank
    begin = tf.get_static_value(operation.inputs[1])
    if begin is None:
        return None
    if operation.type == "Slice":
        return [int(b) for b in begin]
    strides = tf.get_static_value(operation.inputs[3])
    masks = ("ellipsis_mask", "new_axis_mask", "shrink_axis_mask")
    if strides is None or any(s != 1 for s in strides):
        return None
    if any(operation.get_attr(mask) for mask in masks):
        return None
    shape = operation.inputs[0].shape
    first = []
    for axis in range(rank):
        if axis >= len(begin) or operation.get_attr("begin_mask") >> axis & 1:
            first.append(0)
        else:
            b = int(begin[axis])
            first.append(b + int(shape[axis]) if b < 0 else b)
    return first
