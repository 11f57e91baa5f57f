"""Where tensors of a graph have the examples.

Found by tracing the model for two numbers of examples; see `TwoTraces`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Protocol

import tensorflow as tf

# Operations whose outputs tell the shape of their input, and nothing of what it holds.
SHAPES = {"Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike"}
# Operations that leave what is along an axis in its order, if they leave its length as it is.
_ROWWISE = {
    "Abs", "Add", "AddN", "AddV2", "AvgPool", "AvgPool3D", "BatchMatMulV2", "BatchMatMulV3",
    "BiasAdd", "Cast", "ConcatV2", "Conv2D", "Conv3D", "Cos", "DepthwiseConv2dNative", "DivNoNan",
    "Einsum", "Elu", "Erf", "Exp", "ExpandDims", "Expm1", "Greater", "GreaterEqual", "Identity",
    "IdentityN", "LeakyRelu", "Less", "LessEqual", "Log", "Log1p", "LogSoftmax", "MatMul", "Max",
    "MaxPool", "MaxPool3D", "Maximum", "Mean", "Min", "Minimum", "Mul", "Neg", "Pack", "Pad",
    "PadV2", "Pow", "RealDiv", "Reciprocal", "Relu", "Relu6", "Rsqrt", "SelectV2", "Selu",
    "Sigmoid", "Sign", "Sin", "Slice", "Softmax", "Softplus", "Softsign", "Split", "SplitV",
    "Sqrt", "Square", "SquaredDifference", "Squeeze", "StopGradient", "StridedSlice", "Sub", "Sum",
    "Tanh", "Transpose", "Unpack",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a tensor has the examples.

    Attributes:
      axis: the axis.
      positions: how many entries of an example follow one another along it; None where that is not
        known before the data is there.
      before: how many times the examples follow one another, as in time steps laid end to end.
    """

    axis: int
    positions: int | None
    before: int = 1


# The layout of a tensor that holds something of each example; None if that is not known.
Layouts = Callable[[tf.Tensor], Layout | None]


@dataclasses.dataclass(frozen=True)
class Batch:
    """What is known of the examples in a graph.

    Attributes:
      size: the number of examples.
      layout: of any tensor.
      shared: whether a tensor is the same for all examples and holds none of them.
    """

    size: int
    layout: Layouts
    shared: Callable[[tf.Tensor], bool]


def data_dependent(inputs: Iterable[tf.Tensor]) -> set[str]:
    """Names of the operations that make these tensors, and of all whose outputs depend on them."""
    waiting = list(inputs)
    found = {x.op.name for x in waiting}
    while waiting:
        for operation in waiting.pop().consumers():
            if operation.name not in found and operation.type not in SHAPES:
                found.add(operation.name)
                waiting.extend(operation.outputs)
    return found


class Shapes(Protocol):
    """Shapes of tensors by name."""

    def get(self, name: str) -> tf.TensorShape | None:
        """The shape, or None if there is no tensor of this name."""


class TwoTraces:
    """Tells where tensors have the examples from a trace of the same model for another number.

    A tensor of which an axis is a multiple of that number, a prime that nothing else in a model
    is a multiple of, has the examples along that axis. The other trace's operations are found by
    their names.

    Args:
      shapes: by name of a tensor of the other trace, its shape.
      examples: how many examples the other trace was for.
      dependent: names of the operations that depend on the examples, from `data_dependent`.
    """

    def __init__(self, shapes: Shapes, examples: int, dependent: set[str]):
        self._shapes = shapes
        self._examples = examples
        self._dependent = dependent

    def shared(self, x: tf.Tensor) -> bool:
        if x.op.name in self._dependent:
            return False
        shape = self._shapes.get(x.name)
        if shape is None or shape.rank is None:
            return False
        return not any(n and n % self._examples == 0 for n in shape)

    def layout(self, x: tf.Tensor) -> Layout | None:
        shape = self._shapes.get(x.name)
        if shape is None or shape.rank is None:
            return None
        axes = [a for a, n in enumerate(shape) if n and n % self._examples == 0]
        if len(axes) != 1:
            return None
        if shape[axes[0]] == self._examples:
            return Layout(axes[0], 1)
        return self._order(x, axes[0], int(shape[axes[0]]))

    def _axis(self, x: tf.Tensor) -> int | None:
        """The axis along which a tensor has the examples, if it is one."""
        shape = self._shapes.get(x.name)
        if shape is None or shape.rank is None or x.op.name not in self._dependent:
            return None
        axes = [a for a, n in enumerate(shape) if n and n % self._examples == 0]
        return axes[0] if len(axes) == 1 else None

    def _order(self, x: tf.Tensor, axis: int, length: int) -> Layout | None:
        """How the examples lie along an axis that has several entries of each.

        Found back from the tensor to one that has them alone along an axis: only reshaping and
        repeating change how they lie, and of what a reshaping is given only how much comes before
        the examples matters.
        """
        reshaped: list[tuple[tf.TensorShape, int, tf.TensorShape, int]] = []
        last, times = axis, 1
        for _ in range(500):
            shape = self._shapes.get(x.name)
            assert shape is not None
            if shape[last] == self._examples:
                break
            if x.op.type == "Tile" and self._length(x.op.inputs[0], last) != shape[last]:
                # All examples again and again; or something else once for each of them.
                if self._axis(x.op.inputs[0]) is not None:
                    if self._length(x.op.inputs[0], last) != self._examples:
                        return None
                    times = shape[last] // self._examples
                break
            inputs = [(y, self._axis(y)) for y in x.op.inputs]
            before = [(y, a) for y, a in inputs if a is not None]
            if x.op.type != "Reshape":
                if x.op.type not in _ROWWISE and x.op.type != "Tile":
                    return None
                before = [(y, a) for y, a in before if self._length(y, a) == shape[last]]
            if not before:
                return None
            y, a = before[0]
            if x.op.type == "Reshape":
                reshaped.append((self._shapes.get(y.name), a, shape, last))
            x, last = y, a
        else:
            return None
        for given, a, taken, b in reversed(reshaped):
            if a == 0 and b == 0 and times == 1:
                continue
            if not (given[:a].is_fully_defined() and taken[:b].is_fully_defined()):
                return None
            times, rest = divmod(times * math.prod(given[:a]), math.prod(taken[:b]))
            if rest or taken[b] % (times * self._examples):
                return None
        return Layout(axis, length // (times * self._examples), times)

    def _length(self, x: tf.Tensor, axis: int) -> int | None:
        shape = self._shapes.get(x.name)
        return shape[axis] if shape is not None else None
