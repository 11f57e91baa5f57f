"""Per-example gradients of weights by the operations that use them.

A layer that has no rule of its own is still made of operations: a product, a sum, a look-up. In
the graph of the forward pass the uses of a weight are the operations that it reaches through
others that do not see the examples, such as a reshaping, or the product of two low-rank factors.
One backward pass gives g, the gradient with respect to each such operation's output, and for most
kinds of operation g and the other operand give each example's gradient of the weight:

    y = x W, and any einsum        Σ_p x[b, p] ⊗ g[b, p]
    y = x + w, x w, max(x, w), …   what the elements give, summed over what was broadcast
    y = w[ids]                     Σ_p e(ids[b, p]) ⊗ g[b, p]
    y = x ∗ W                      Σ_p patch(x[b], p) ⊗ g[b, p]
    y = w repeated                 Σ g over the repetitions, but for the example's

What lies between the weight and its use is linear in that gradient, and passes it on. A weight
that is used in several ways has the sum of them. So it does not matter to which layer a weight
belongs, whether it is tied, or what class the layer is of. An operation that is not known here
leaves its weights to `general`.

To add an operation, write a function and put `@use("ItsType")` on it; one that weights alone go
through is added to `passages`.
"""

import dataclasses
import math
import string
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import tensorflow as tf

from tracin_beam.gradients import forms, layouts, passages
from tracin_beam.gradients.forms import Form, Full, Outer, Rows, Window, Windowed
from tracin_beam.gradients.layouts import Batch, Layout
from tracin_beam.gradients.passages import Unknown, flattened

_NO_GRADIENT = {*layouts.SHAPES, "StopGradient", "PreventGradient"}


@dataclasses.dataclass(frozen=True)
class WeightUses:
    """The uses of some weights.

    Attributes:
      sources: the weights.
      passages: operations between weights and uses, in the order of the graph.
      uses: the operations that mix weights with examples.
      reached: references of the weights and of all that is made of them alone.
    """

    sources: Sequence[tf.Tensor]
    passages: Sequence[tf.Operation]
    uses: Sequence[tf.Operation]
    reached: set[Any]


Use = Callable[[tf.Operation, int, tf.Tensor, Batch], Form]

_USES: dict[str, Use] = {}


def use(*types: str) -> Callable[[Use], Use]:
    """Registers the rule of operations: (operation, which input, g, batch) -> gradient."""

    def register(function: Use) -> Use:
        _USES.update(dict.fromkeys(types, function))
        return function

    return register


def find(
    sources: Sequence[tf.Tensor],
    shared: Callable[[tf.Tensor], bool],
    covered: Container[str] = (),
) -> WeightUses:
    """The uses of these weights in the graph as it is now, but for operations of these names."""
    through: dict[str, tf.Operation] = {}
    uses: dict[str, tf.Operation] = {}
    reached = {source.ref() for source in sources}
    waiting = list(sources)
    while waiting:
        for operation in waiting.pop().consumers():
            if operation.name in through or operation.name in uses:
                continue
            if operation.name in covered:
                continue
            outputs = [x for x in operation.outputs if x.dtype.is_floating]
            if operation.type in _NO_GRADIENT or not (outputs or _opaque(operation)):
                continue
            if all(shared(x) for x in outputs) and not _opaque(operation):
                through[operation.name] = operation
                reached.update(x.ref() for x in outputs)
                waiting.extend(outputs)
            else:
                uses[operation.name] = operation
    ordered = sorted(through.values(), key=lambda operation: operation._id)
    return WeightUses(sources, ordered, list(uses.values()), reached)


def _opaque(operation: tf.Operation) -> bool:
    """Whether no rule may be asked: complex numbers, or a list out of which anything may come."""
    hidden = (tf.variant, tf.resource)
    return any(x.dtype in hidden or x.dtype.is_complex for x in operation.outputs)


def outputs(found: WeightUses) -> list[tf.Tensor]:
    """The outputs of the uses, with respect to which gradients are wanted."""
    return [x for o in found.uses if not _opaque(o) for x in o.outputs if x.dtype.is_floating]


def gradients(
    found: WeightUses, of_outputs: Mapping[str, tf.Tensor | None], batch: Batch
) -> tuple[list[Form | None], dict[str, tf.Operation]]:
    """Each example's gradients of the weights.

    Args:
      found: the weights' uses.
      of_outputs: g by name of a tensor of `outputs`; None where nothing depends on it.
      batch: what is known of the examples.

    Returns:
      For each weight its gradient, or None if it has none or if it is not known; and by name the
      uses that no rule is for. `missing` says which weights are not known.
    """
    partial: dict[Any, list[Form]] = {}
    unknown: dict[str, tf.Operation] = {}
    for operation in found.uses:
        given = [of_outputs[x.name] for x in operation.outputs if x.name in of_outputs]
        if _opaque(operation) or (len(given) > 1 and any(g is not None for g in given)):
            unknown[operation.name] = operation
            continue
        g = given[0] if given else None
        if g is None:
            continue
        for i, x in enumerate(operation.inputs):
            if x.ref() not in found.reached:
                continue
            rule = _USES.get(operation.type)
            if rule is None:
                unknown[operation.name] = operation
                continue
            try:
                partial.setdefault(x.ref(), []).append(rule(operation, i, g, batch))
            except Unknown:
                unknown[operation.name] = operation
    blocked = {x.ref() for operation in unknown.values() for x in operation.inputs} & found.reached
    for operation in reversed(found.passages):
        for output in operation.outputs:
            if output.ref() in blocked:
                blocked.update(x.ref() for x in operation.inputs if x.ref() in found.reached)
                continue
            parts = partial.pop(output.ref(), None)
            if parts is None:
                continue
            for i, x in enumerate(operation.inputs):
                if x.ref() not in found.reached or x.ref() in blocked:
                    continue
                try:
                    earlier = passages.back(operation, i, parts, output)
                except Unknown:
                    unknown[operation.name] = operation
                    blocked.add(x.ref())
                else:
                    partial.setdefault(x.ref(), []).extend(earlier)
    results: list[Form | None] = []
    for source in found.sources:
        parts = None if source.ref() in blocked else partial.get(source.ref())
        results.append(forms.add(parts, source.shape) if parts else None)
    return results, unknown


def missing(found: WeightUses, unknown: dict[str, tf.Operation]) -> list[int]:
    """Indices of the weights whose gradient takes one of these operations."""
    reaching = {x.ref() for operation in unknown.values() for x in operation.inputs}
    for operation in reversed(found.passages):
        if any(output.ref() in reaching for output in operation.outputs):
            reaching.update(x.ref() for x in operation.inputs)
    return [i for i, source in enumerate(found.sources) if source.ref() in reaching]


@use("AddV2", "Add", "Sub", "BiasAdd", "BroadcastTo", "Mul")
def _elementwise(operation: tf.Operation, i: int, g: tf.Tensor, batch: Batch) -> Form:
    if operation.type == "BiasAdd" and operation.get_attr("data_format") != b"NHWC":
        raise Unknown("BiasAdd")
    if operation.type == "Sub" and i == 1:
        g = -g
    if operation.type == "Mul":
        g = g * operation.inputs[1 - i]
    return _unbroadcast(g, operation.inputs[i], operation.outputs[0], batch)


@use(
    "RealDiv", "Div", "DivNoNan", "Maximum", "Minimum", "Pow", "SquaredDifference", "SelectV2",
    "Xdivy", "Xlogy", "Atan2", "FloorMod",
)  # fmt: skip
def _any_elementwise(operation: tf.Operation, i: int, g: tf.Tensor, batch: Batch) -> Form:
    """By the operation's own gradient with respect to the weight spread out over the output."""
    y = operation.outputs[0]
    wide = tf.broadcast_to(operation.inputs[i], tf.shape(y))
    wide.set_shape(y.shape)
    names = [argument.name for argument in operation.op_def.input_arg]
    arguments = dict(zip(names, operation.inputs, strict=True))
    arguments[names[i]] = wide
    again = getattr(tf.raw_ops, operation.type)(**arguments)
    (gradient,) = tf.gradients(again, [wide], grad_ys=[g])
    if gradient is None:
        raise Unknown(operation.type)
    return _unbroadcast(gradient, operation.inputs[i], y, batch)


def _unbroadcast(gradient: tf.Tensor, x: tf.Tensor, y: tf.Tensor, batch: Batch) -> Form:
    """Sums a gradient of y's shape over the axes along which x was broadcast, for each example."""
    layout = batch.layout(y)
    if layout is None or y.shape.rank is None or x.shape.rank is None:
        raise Unknown("broadcast")
    aligned = [1] * (y.shape.rank - x.shape.rank) + list(x.shape)
    if aligned[layout.axis] != 1:
        raise Unknown("broadcast")
    gradient = tf.cast(gradient, tf.float32)
    gradient.set_shape(y.shape)
    over = [a for a, n in enumerate(aligned) if n == 1 and a != layout.axis]
    left = [a for a in range(y.shape.rank) if a not in over]
    gradient = tf.reduce_sum(gradient, axis=over)
    place = left.index(layout.axis)
    if place:
        gradient = tf.transpose(gradient, [place, *(a for a in range(len(left)) if a != place)])
    if layout.positions != 1 or layout.before != 1:
        rest = [n if n is not None else tf.shape(x)[-1] for n in gradient.shape[1:]]
        apart = tf.reshape(gradient, [layout.before, batch.size, _count(layout), *rest])
        gradient = tf.reduce_sum(apart, axis=[0, 2])
    else:
        gradient = tf.ensure_shape(gradient, [batch.size, *gradient.shape[1:]])
    return flattened(gradient, x)


def _count(layout: Layout) -> int:
    return -1 if layout.positions is None else layout.positions


@use("Tile")
def _repeated(operation: tf.Operation, i: int, g: tf.Tensor, batch: Batch) -> Form:
    x, y = operation.inputs[i], operation.outputs[0]
    layout = batch.layout(y)
    if layout is None or layout.before != 1 or not x.shape.is_fully_defined():
        raise Unknown("Tile")
    if x.shape[layout.axis] != layout.positions:
        raise Unknown("Tile")
    # Each axis as (repetitions, its own length).
    apart: list[Any] = []
    for axis, length in enumerate(x.shape):
        apart += [batch.size if axis == layout.axis else -1, length]
    unknown = [axis for axis in range(y.shape.rank) if y.shape[axis] is None]
    if len(unknown) > 1:
        raise Unknown("Tile")
    for axis, length in enumerate(x.shape):
        if axis != layout.axis and y.shape[axis] is not None:
            apart[2 * axis] = y.shape[axis] // length
    g = tf.reshape(tf.cast(g, tf.float32), apart)
    g = tf.reduce_sum(g, axis=[2 * a for a in range(y.shape.rank) if a != layout.axis])
    g = tf.transpose(g, [layout.axis, *(a for a in range(g.shape.rank) if a != layout.axis)])
    return flattened(g, x)


@use("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum")
def _product(operation: tf.Operation, i: int, g: tf.Tensor, batch: Batch) -> Form:
    """Any product of a weight with something of the examples, by the labels of its axes."""
    if len(operation.inputs) != 2:
        raise Unknown(operation.type)
    labels = _einsum(operation) if operation.type == "Einsum" else _matmul(operation)
    w, x, y = operation.inputs[i], operation.inputs[1 - i], operation.outputs[0]
    in_w, in_x, in_y = labels[i], labels[1 - i], labels[2]
    if not w.shape.is_fully_defined() or any(len(set(part)) < len(part) for part in labels):
        raise Unknown(operation.type)
    # An axis of length one that was broadcast is none.
    sizes = {label: n for label, n in zip(in_y + in_x, [*y.shape, *x.shape], strict=True) if n != 1}
    in_w = "".join(
        label for label, n in zip(in_w, w.shape, strict=True) if n != 1 or sizes.get(label, 1) == 1
    )
    of_x, of_y = batch.layout(x), batch.layout(y)
    if of_x is None or of_y is None:
        raise Unknown(operation.type)
    example = in_y[of_y.axis]
    if in_x[of_x.axis] != example or example in in_w or not _alike(of_x, of_y):
        raise Unknown(operation.type)
    in_x, x = _examples_first(in_x, x, of_x, batch)
    in_y, g = _examples_first(in_y, g, of_y, batch)
    once = [a for a, n in enumerate(x.shape) if a > 1 and n == 1 and sizes.get(in_x[a], 1) != 1]
    if once:
        x = tf.squeeze(x, once)
        in_x = "".join(label for a, label in enumerate(in_x) if a not in once)
    return contraction(in_w, in_x, in_y, x, g)


def _examples_first(
    labels: str, x: tf.Tensor, layout: Layout, batch: Batch
) -> tuple[str, tf.Tensor]:
    """Axes in the order (example, "!" for its entries along the same axis, others)."""
    axis = layout.axis
    rest = labels[:axis] + labels[axis + 1 :]
    return labels[axis] + "!" + rest, _gathered(tf.cast(x, tf.float32), layout, batch)


def _gathered(x: tf.Tensor, layout: Layout, batch: Batch) -> tf.Tensor:
    """Each example's entries together: [B, entries, *other axes]."""
    axis = layout.axis
    if axis:
        x = tf.transpose(x, [axis, *(a for a in range(x.shape.rank) if a != axis)])
    lengths = [n if n is not None else tf.shape(x)[1 + a] for a, n in enumerate(x.shape[1:])]
    if layout.before == 1:
        return tf.reshape(x, [batch.size, _count(layout), *lengths])
    apart = tf.reshape(x, [layout.before, batch.size, _count(layout), *lengths])
    apart = tf.transpose(apart, [1, 0, *range(2, apart.shape.rank)])
    count = -1 if layout.positions is None else layout.before * layout.positions
    return tf.reshape(apart, [batch.size, count, *lengths])


def _alike(one: Layout, other: Layout) -> bool:
    return (one.positions, one.before) == (other.positions, other.before)


def contraction(in_w: str, in_x: str, in_y: str, x: tf.Tensor, g: tf.Tensor) -> Form:
    """The gradient of w in y = einsum(w, x), each tensor with a label for each of its axes.

    Args:
      in_w, in_x, in_y: labels; the first of x and y is the example's.
      x: float32, g: float32, the gradient with respect to y.

    Raises:
      Unknown: a label that w alone has, or x alone.
    """
    rows = "".join(label for label in in_w if label not in in_y)
    columns = "".join(label for label in in_w if label not in in_x)
    both = [label for label in in_w if label in in_x and label in in_y]
    if set(rows) & set(columns) or any(a not in in_w and a not in in_y for a in in_x):
        raise Unknown("einsum")
    if any(a not in in_w and a not in in_x for a in in_y):
        raise Unknown("einsum")
    positions = [label for label in in_x[1:] if label in in_y and label not in in_w]
    if not both and in_w in (rows + columns, columns + rows):
        left = _grouped(in_x, x, positions, rows)
        right = _grouped(in_y, g, positions, columns)
        return Outer(left, right) if in_w == rows + columns else Outer(right, left)
    equation = f"{in_x},{in_y}->{in_x[0]}{in_w}".replace("!", _unused(in_x + in_y + in_w))
    value = tf.einsum(equation, x, g)
    return Full(tf.reshape(value, [value.shape[0], math.prod(value.shape[1:])]))


def _unused(labels: str) -> str:
    return next(label for label in string.ascii_letters if label not in labels)


def _grouped(labels: str, x: tf.Tensor, positions: Sequence[str], kept: str) -> tf.Tensor:
    """Brings axes with these labels to [B, P, K]."""
    order = [0, *(labels.index(label) for label in [*positions, *kept])]
    if order != list(range(len(order))):
        x = tf.transpose(x, order)
    size = math.prod(x.shape[1 + len(positions) :])
    known = x.shape[1 : 1 + len(positions)]
    count = math.prod(known) if known.is_fully_defined() else -1
    return tf.reshape(x, [x.shape[0], count, size])


def _matmul(operation: tf.Operation) -> tuple[str, str, str]:
    """Labels of (left, right, output) of a product of matrices, of several at a time too."""
    names = ("transpose_a", "transpose_b") if operation.type == "MatMul" else ("adj_x", "adj_y")
    turned = [operation.get_attr(name) for name in names]
    ranks = [x.shape.rank for x in (*operation.inputs, operation.outputs[0])]
    if any(rank is None for rank in ranks):
        raise Unknown(operation.type)
    outer = string.ascii_lowercase[: ranks[2] - 2]
    left, right = ("KM" if turned[0] else "MK"), ("NK" if turned[1] else "KN")
    first, second = outer[len(outer) - (ranks[0] - 2) :], outer[len(outer) - (ranks[1] - 2) :]
    return first + left, second + right, outer + "MN"


def _einsum(operation: tf.Operation) -> tuple[str, str, str]:
    equation = operation.get_attr("equation").decode().replace(" ", "")
    operands, output = equation.split("->")
    terms = [*operands.split(","), output]
    tensors = [*operation.inputs, operation.outputs[0]]
    spare = [label for label in string.ascii_letters if label not in equation]
    if any(x.shape.rank is None for x in tensors):
        raise Unknown("Einsum")
    extra = [x.shape.rank - len(t) + 3 for t, x in zip(terms, tensors, strict=True) if "..." in t]
    most = max(extra, default=0)
    labels = []
    for term, x in zip(terms, tensors, strict=True):
        count = x.shape.rank - len(term) + 3
        labels.append(term.replace("...", "".join(spare[most - count : most])))
    return labels[0], labels[1], labels[2]


@use("GatherV2")
def _lookup(operation: tf.Operation, i: int, g: tf.Tensor, batch: Batch) -> Form:
    w, ids, axis = operation.inputs
    of_ids, of_y = batch.layout(ids), batch.layout(operation.outputs[0])
    if i != 0 or tf.get_static_value(axis) != 0 or operation.get_attr("batch_dims"):
        raise Unknown("GatherV2")
    if of_ids is None or of_y is None or of_ids != of_y:
        raise Unknown("GatherV2")
    if of_ids.axis or of_ids.before != 1:
        ids, g = _gathered(ids, of_ids, batch), _gathered(g, of_ids, batch)
        known = ids.shape[1:].is_fully_defined()
        count = math.prod(ids.shape[1:]) if known else -1
    else:
        known = ids.shape[1:].is_fully_defined() and of_ids.positions is not None
        count = of_ids.positions * math.prod(ids.shape[1:]) if known else -1
    width = math.prod(w.shape[1:])
    if ids.dtype not in (tf.int32, tf.int64):
        ids = tf.cast(ids, tf.int32)
    rows = tf.reshape(tf.cast(g, tf.float32), [batch.size, count, width])
    return Rows(tf.reshape(ids, [batch.size, count]), rows)


@use("GatherNd")
def _looked_up_at(operation: tf.Operation, i: int, g: tf.Tensor, batch: Batch) -> Form:
    """A look-up by several indices is one in a table of the axes that they take together."""
    w, ids = operation.inputs
    of_ids = batch.layout(ids)
    if i != 0 or of_ids != Layout(0, 1) or batch.layout(operation.outputs[0]) != of_ids:
        raise Unknown("GatherNd")
    depth = ids.shape[-1]
    if not depth or not w.shape.is_fully_defined():
        raise Unknown("GatherNd")
    steps = [math.prod(w.shape[a + 1 : depth]) for a in range(depth)]
    flat = tf.reduce_sum(ids * tf.constant(steps, ids.dtype), axis=-1)
    count = math.prod(flat.shape[1:]) if flat.shape[1:].is_fully_defined() else -1
    width = math.prod(w.shape[depth:])
    rows = tf.reshape(tf.cast(g, tf.float32), [batch.size, count, width])
    form = Rows(tf.reshape(flat, [batch.size, count]), rows)
    if depth == 1:
        return form
    # Rows are of the first axis alone.
    return flattened(forms.materialise(form, [math.prod(w.shape[:depth]), width]), w)


@use("Conv2D", "Conv3D")
def _convolution(operation: tf.Operation, i: int, g: tf.Tensor, batch: Batch) -> Form:
    x, w = operation.inputs
    of_x, of_y = batch.layout(x), batch.layout(operation.outputs[0])
    if i != 1 or of_x is None or of_x != of_y or of_x.axis or not w.shape.is_fully_defined():
        raise Unknown(operation.type)
    x, window = _windowed(operation, x, w)
    x, g = tf.cast(x, tf.float32), tf.cast(g, tf.float32)
    groups = int(x.shape[-1]) // int(w.shape[-2])
    if of_x.positions == 1 and of_x.before == 1 and groups == 1:
        return Windowed(x, _flat(g, batch.size), window)
    if of_x.positions is None:
        raise Unknown(operation.type)
    entries = of_x.positions * of_x.before
    x, g = (_flattened(y, of_x, batch) for y in (x, g))
    if groups == 1:
        patches = tf.concat(forms.slices(x, window), axis=-1)
        left = tf.reshape(patches, [batch.size, -1, patches.shape[-1]])
        return Outer(left, tf.reshape(g, [batch.size, -1, g.shape[-1]]))
    found = forms.grouped(x, _flat(g, batch.size * entries), window, groups)
    return flattened(_summed(found, entries), w)


@use("Conv2DBackpropInput", "Conv2DBackpropInputV2", "Conv3DBackpropInputV2")
def _transposed_convolution(operation: tf.Operation, i: int, g: tf.Tensor, batch: Batch) -> Form:
    """A convolution of g with outputs at x's positions."""
    _, w, x = operation.inputs
    of_x, of_y = batch.layout(x), batch.layout(operation.outputs[0])
    if i != 1 or of_x != Layout(0, 1) or of_y != of_x or not w.shape.is_fully_defined():
        raise Unknown(operation.type)
    if operation.get_attr("padding") == b"EXPLICIT" or g.shape[-1] != w.shape[-2]:
        raise Unknown(operation.type)
    g, window = _windowed(operation, g, w)
    return Windowed(tf.cast(g, tf.float32), _flat(tf.cast(x, tf.float32), batch.size), window)


@use("DepthwiseConv2dNative")
def _depthwise(operation: tf.Operation, i: int, g: tf.Tensor, batch: Batch) -> Form:
    x, w = operation.inputs
    layout = batch.layout(x)
    if i != 1 or layout is None or layout.axis or layout.positions is None:
        raise Unknown(operation.type)
    x, window = _windowed(operation, x, w)
    x, g = (_flattened(tf.cast(y, tf.float32), layout, batch) for y in (x, g))
    entries = layout.positions * layout.before
    found = forms.depthwise(x, _flat(g, batch.size * entries), window, int(w.shape[3]))
    return flattened(_summed(found, entries), w)


def _windowed(operation: tf.Operation, x: tf.Tensor, w: tf.Tensor) -> tuple[tf.Tensor, Window]:
    """The window of a convolution, and its input, to which explicit padding is added."""
    rank = w.shape.rank - 2
    padding = operation.get_attr("padding").decode().lower()
    if operation.get_attr("data_format") not in (b"NHWC", b"NDHWC"):
        raise Unknown(operation.type)
    if padding == "explicit":
        pads = operation.get_attr("explicit_paddings")
        x, padding = tf.pad(x, [pads[2 * a : 2 * a + 2] for a in range(rank + 2)]), "valid"
    strides, dilations = operation.get_attr("strides"), operation.get_attr("dilations")
    inner = slice(1, 1 + rank)
    return x, Window(tuple(w.shape[:rank]), tuple(strides[inner]), tuple(dilations[inner]), padding)


def _flat(x: tf.Tensor, size: int) -> tf.Tensor:
    """[B, *spatial, C] to [B, P, C]."""
    places = x.shape[1:-1]
    count = math.prod(places) if places.is_fully_defined() else -1
    return tf.reshape(x, [size, count, x.shape[-1]])


def _flattened(x: tf.Tensor, layout: Layout, batch: Batch) -> tf.Tensor:
    """Each example's entries after one another along the first axis."""
    if layout.before != 1:
        lengths = [n if n is not None else tf.shape(x)[1 + a] for a, n in enumerate(x.shape[1:])]
        entries = layout.before * (layout.positions or 1)
        x = tf.reshape(_gathered(x, layout, batch), [batch.size * entries, *lengths])
    size = batch.size * layout.before * (layout.positions or 1)
    return tf.ensure_shape(x, [size, *x.shape[1:]])


def _summed(x: tf.Tensor, entries: int) -> tf.Tensor:
    """Over each example's entries along the first axis."""
    if entries == 1:
        return x
    return tf.reduce_sum(tf.reshape(x, [-1, entries, *x.shape[1:]]), axis=1)
