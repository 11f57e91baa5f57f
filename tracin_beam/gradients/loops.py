"""Loops whose number of steps is known, written out step by step.

What is done with a weight in a loop's body is not seen from outside of it. Written out, a step is
operations like any others: each use of a weight there is one (see `uses`), and a layer called
there takes its rule.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.ops import while_loop

# Longer loops would take minutes to trace.
STEPS = 256

_LOOPS = {"While", "StatelessWhile"}


def any_in(graph: Any) -> bool:
    """Whether a graph has a loop."""
    return any(operation.type in _LOOPS for operation in graph.get_operations())


@contextlib.contextmanager
def written_out(wanted: Callable[[], bool]) -> Iterator[None]:
    """Within it, loops of at most STEPS steps are written out where they are wanted to be."""
    original = while_loop.while_loop

    def loop(cond: Any, body: Any, loop_vars: Any, *args: Any, **kwargs: Any) -> Any:
        if wanted():
            found = _steps(cond, body, loop_vars, kwargs.get("maximum_iterations"))
            if found is not None:
                single = len(found) == 1 and not kwargs.get("return_same_structure", False)
                return found[0] if single else found
        return original(cond, body, loop_vars, *args, **kwargs)

    while_loop.while_loop = loop
    try:
        yield
    finally:
        while_loop.while_loop = original


def _steps(cond: Any, body: Any, loop_vars: Any, maximum: Any) -> Any:
    """The variables after the last step; None if how many steps there are is not known."""
    most = None if maximum is None else _value(tf.convert_to_tensor(maximum))
    if maximum is not None and most is None:
        return None
    variables = tf.nest.map_structure(_as_tensor, loop_vars)
    for step in range(STEPS + 1):
        going = _value(tf.convert_to_tensor(cond(*variables)))
        if going is None:
            return None
        if not going or (most is not None and step >= most):
            return variables
        if step < STEPS:
            found = body(*variables)
            if len(variables) == 1 and not isinstance(found, list | tuple):
                found = [found]
            flat = [_counted(_as_tensor(x)) for x in tf.nest.flatten(found)]
            variables = tf.nest.pack_sequence_as(loop_vars, flat)
    return None


def _as_tensor(x: Any) -> Any:
    if isinstance(x, tf.TensorArray | tf.__internal__.CompositeTensor):
        return x
    return tf.convert_to_tensor(x)


def _counted(x: Any) -> Any:
    """A number that is known, as a constant: so the next step's are found without looking back."""
    if tf.is_tensor(x) and x.dtype.is_integer and x.shape.rank == 0:
        value = _value(x)
        return x if value is None else tf.constant(value, x.dtype)
    return x


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "AddV2": np.add, "Sub": np.subtract, "Mul": np.multiply, "Neg": np.negative,
    "FloorDiv": np.floor_divide, "FloorMod": np.mod, "Minimum": np.minimum, "Maximum": np.maximum,
    "Less": np.less, "LessEqual": np.less_equal, "Greater": np.greater,
    "GreaterEqual": np.greater_equal, "Equal": np.equal, "NotEqual": np.not_equal,
    "LogicalAnd": np.logical_and, "LogicalOr": np.logical_or, "LogicalNot": np.logical_not,
    "Identity": lambda x: x,
}  # fmt: skip


def _value(x: tf.Tensor) -> Any:
    """What a tensor is whatever the examples, as NumPy has it; None if that is not known."""
    known = tf.get_static_value(x)
    if known is not None:
        return known
    operation = x.op
    if operation.type == "Cast":
        given = _value(operation.inputs[0])
        return None if given is None else np.asarray(given).astype(x.dtype.as_numpy_dtype)
    if operation.type == "StridedSlice":  # of a shape, as a rule
        given, *where = (_value(y) for y in operation.inputs)
        if given is None or any(w is None or np.size(w) != 1 for w in where):
            return None
        first, last, stride = (int(np.reshape(w, [])) for w in where)
        return given[first] if operation.get_attr("shrink_axis_mask") else given[first:last:stride]
    function = _FUNCTIONS.get(operation.type)
    if function is None:
        return None
    inputs = [_value(y) for y in operation.inputs]
    return None if any(y is None for y in inputs) else function(*inputs)
