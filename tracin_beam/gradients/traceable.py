"""Models whose every operation is seen when they are traced, and that keep nothing of a trace."""

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.autograph.core import ag_ctx, converter
from tensorflow.python.autograph.impl import api
from tensorflow.python.eager.polymorphic_function.polymorphic_function import Function
from tensorflow.python.ops import custom_gradient


def make_traceable(model: keras.Model) -> None:
    """Changes what in a model would tie it to the first values it was run with.

    A `tf.function` inside of it, such as a layer's call, keeps the values of the variables that it
    was traced with: what it does is done in place instead, so that its operations are seen, too. A
    rematerialised layer gives no gradients but to its arguments: it is run as any other. A
    Normalization keeps tensors made of its statistics: they are made anew.
    """
    for layer in model._flatten_layers():
        layer._remat_mode = None
        if isinstance(layer, keras.layers.Normalization):
            object.__setattr__(layer, "call", _with_own_statistics(layer, layer.call))
        for name in {*dir(type(layer)), *vars(layer)}:
            member = inspect.getattr_static(layer, name, None)
            if isinstance(member, tf.types.experimental.PolymorphicFunction):
                object.__setattr__(layer, name, _in_place(getattr(layer, name)))


def _with_own_statistics(
    layer: keras.layers.Normalization, call: Callable[..., Any]
) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        kept = layer.mean, layer.variance
        layer.finalize_state()
        try:
            return call(*args, **kwargs)
        finally:
            layer.mean, layer.variance = kept

    return wrapped


def _in_place(function: Any) -> Callable[..., Any]:
    options = converter.ConversionOptions(recursive=True, user_requested=True)

    def call(*args: Any, **kwargs: Any) -> Any:
        if function.input_signature is not None and not kwargs:
            args = tf.nest.map_structure(_as_specified, tuple(function.input_signature), args)
        if getattr(function, "_autograph", True):
            # Calls of layers are watched by functions that are not to be converted themselves.
            with ag_ctx.ControlStatusCtx(ag_ctx.Status.ENABLED, options):
                return api.converted_call(function.python_function, args, kwargs, options=options)
        return function.python_function(*args, **kwargs)

    return call


def _as_specified(spec: Any, x: Any) -> Any:
    return tf.convert_to_tensor(x, spec.dtype) if isinstance(spec, tf.TensorSpec) else x


@contextlib.contextmanager
def seen_through() -> Iterator[None]:
    """Within it, graphs of this thread have what is done in a `tf.function` as operations.

    A function of the user's own, outside of any layer, would hide the uses of weights that it is
    given, and keep the values of those that it finds by itself. What is compiled by XLA stays so.
    What is rematerialised, which gives no gradients of such weights, is run as anything else.
    """
    thread = threading.get_ident()
    called, decorated = Function.__call__, custom_gradient._graph_mode_decorator

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread or tf.executing_eagerly() or self._jit_compile:
            return called(self, *args, **kwargs)
        return _in_place(self)(*args, **kwargs)

    def decorate(function: Any, args: Any, kwargs: Any) -> Any:
        if function.__qualname__ == "recompute_grad.<locals>.inner":
            return inspect.getclosurevars(function).nonlocals["f"](*args, **kwargs)
        return decorated(function, args, kwargs)

    with (
        patched(Function, "__call__", call),
        patched(custom_gradient, "_graph_mode_decorator", decorate),
    ):
        yield


@contextlib.contextmanager
def patched(owner: Any, name: str, by: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, by)
    try:
        yield
    finally:
        setattr(owner, name, before)
