"""One forward and one backward pass that give each example's gradient of each weight.

The model runs once over the batch with every layer that has a rule recorded: its input, and its
output before a fused activation. One backward pass to those outputs, of the summed per-example
losses, then gives every example's output gradients of every layer at once, and the layers' rules
turn them into weight gradients.

The weights are arguments, not state: each variable's value is put in its place by a
`keras.StatelessScope`. So one traced function serves every checkpoint, from several threads at
a time. Inside a recorded call the layer's own weights do not pass gradients on. If the loss still
has a gradient with respect to a weight, then that weight was used elsewhere (in a layer without
a rule, tied to another layer, in a loop), and the rules do not give all of its gradient: such
weights go through `vectorised`, which runs the whole model for each example separately.
"""

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common.stateless_scope import get_stateless_scope

from tracin_beam.gradients import forms, nests
from tracin_beam.gradients.forms import Form
from tracin_beam.gradients.rules import Rule, rule_for

# (features, label, sample_weight) -> [B] quantities to be differentiated, and anything else.
Forward = Callable[[Any, Any, Any], tuple[tf.Tensor, Any]]


@dataclasses.dataclass(frozen=True)
class Weight:
    """A trainable weight of the model.

    Attributes:
      path: its layer's place in the model and its name, the same in every process.
      variable: the Keras variable.
      layer: the layer that owns it.
    """

    path: str
    variable: keras.Variable
    layer: keras.layers.Layer

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(n) for n in self.variable.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Captured:
    """What one forward and backward pass gave.

    Attributes:
      quantity: float32 [B], the per-example quantity that was differentiated.
      auxiliary: what else the forward function returned.
      gradients: by index of the weight; a weight that the quantity does not depend on is absent.
      general: indices of the weights that took the general way.
    """

    quantity: tf.Tensor
    auxiliary: Any
    gradients: dict[int, Form]
    general: tuple[int, ...]


@dataclasses.dataclass
class _Call:
    layer: keras.layers.Layer
    rule: Rule
    inputs: tf.Tensor
    outputs: tf.Tensor


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a run of the model on one example showed.

    Attributes:
      layers: the layers that have a rule and see the examples along their first axis.
      outputs: numbers that those layers give out for an example.
      written: numbers in an example's gradient that may have to be written out: all but those of
        dense layers with one position, and of embeddings.
    """

    layers: list[keras.layers.Layer]
    outputs: int
    written: int


def survey(weights: Sequence[Weight], run: Callable[[], Any]) -> Survey:
    """Which layers may be recorded, and what that takes.

    Whether a layer sees the examples along its first axis is seen from its inputs. The batch size
    alone would not tell: of a layer that sees the time first, as many steps may be given as the
    batch has examples.

    Args:
      weights: weights of a built model.
      run: runs the model, eagerly, on a batch of one.
    """
    layers = [layer for layer in _layers(weights) if rule_for(layer) is not None]
    others: set[int] = set()
    factored: set[int] = set()
    outputs = 0

    def watched(layer: Any, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal outputs
            if not tf.is_tensor(inputs) or inputs.shape[:1] != [1]:
                others.add(id(layer))
            elif inputs.shape.rank == 2 and isinstance(layer, keras.layers.Dense):
                factored.add(id(layer))
            result = call(inputs, *args, **kwargs)
            outputs += sum(math.prod(x.shape) for x in tf.nest.flatten(result) if tf.is_tensor(x))
            return result

        return wrapper

    with _replaced_calls(layers, watched):
        run()
    factored |= {id(layer) for layer in layers if isinstance(layer, keras.layers.Embedding)}
    written = sum(w.size for w in weights if id(w.layer) not in factored)
    return Survey([layer for layer in layers if id(layer) not in others], outputs, written)


def make_traceable(model: keras.Model) -> None:
    """Changes what in a model would tie it to the first values it was run with.

    A `tf.function` inside of it, such as a layer's call, keeps the values of the variables that it
    was traced with: it is traced anew in each call. A rematerialised layer gives no gradients but
    to its arguments: it is run as any other.
    """
    for layer in model._flatten_layers():
        layer._remat_mode = None
        for name in {*dir(type(layer)), *vars(layer)}:
            member = inspect.getattr_static(layer, name, None)
            if isinstance(member, tf.types.experimental.PolymorphicFunction):
                object.__setattr__(layer, name, _fresh(getattr(layer, name)))


def _fresh(function: Any) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return function._clone(None)(*args, **kwargs)

    return call


def per_example_gradients(
    forward: Forward,
    variables: Sequence[keras.Variable],
    values: Sequence[tf.Tensor],
    weights: Sequence[Weight],
    layers: Sequence[keras.layers.Layer],
    features: Any,
    label: Any,
    sample_weight: Any,
) -> Captured:
    """∂quantity_b/∂w for every example b of the batch and every weight w.

    To be called while tracing a `tf.function` whose inputs have a static batch size.

    Args:
      forward: (features, label, sample_weight) -> (quantity [B], auxiliary), running the model.
      variables: all variables of the model.
      values: their values, in the same order.
      weights: the trainable weights that are wanted.
      layers: those of their layers that may take their rules, from `survey`.
      features, label, sample_weight: the batch, as the task's parse gave it.
    """
    value_of = {id(v): tf.convert_to_tensor(x) for v, x in zip(variables, values, strict=True)}
    mapping = [(v, value_of[id(v)]) for v in variables]
    sources = [value_of[id(w.variable)] for w in weights]
    index = {id(w.variable): i for i, w in enumerate(weights)}
    batch_size = tf.nest.flatten(features)[0].shape[0]

    tape = tf.GradientTape(watch_accessed_variables=False)
    with keras.StatelessScope(mapping), tape:
        for source in sources:
            tape.watch(source)
        with _recording(layers, tape, value_of, batch_size) as calls:
            quantity, auxiliary = forward(features, label, sample_weight)
        total = tf.reduce_sum(quantity)
    outer, rest = tape.gradient(total, [[call.outputs for call in calls], sources])
    general = {i for i, gradient in enumerate(rest) if gradient is not None}

    found: dict[int, list[Form]] = {}
    with keras.StatelessScope(mapping):
        for call, gradient in zip(calls, outer, strict=True):
            if gradient is None:
                continue
            try:
                contributions = call.rule(call.layer, call.inputs, gradient)
            except NotImplementedError:
                contributions = []
            for variable, form in contributions:
                if id(variable) in index:
                    found.setdefault(index[id(variable)], []).append(form)
            covered = {id(variable) for variable, _ in contributions}
            general |= {
                index[id(v)]
                for v in call.layer._trainable_variables
                if id(v) in index and id(v) not in covered
            }
    gradients = {
        i: forms.add(found[i], weights[i].shape) for i in sorted(found) if i not in general
    }
    if general:
        order = sorted(general)
        slow = vectorised(
            forward, variables, values, [weights[i] for i in order], features, label, sample_weight
        )
        gradients.update(zip(order, slow, strict=True))
    return Captured(quantity, auxiliary, gradients, tuple(sorted(general)))


def vectorised(
    forward: Forward,
    variables: Sequence[keras.Variable],
    values: Sequence[tf.Tensor],
    weights: Sequence[Weight],
    features: Any,
    label: Any,
    sample_weight: Any,
) -> list[forms.Full]:
    """The general way: the whole model and its gradient for each example as a batch of one.

    `tf.vectorized_map` turns the loop over examples into batched operations. Models that contain
    loops of their own, as recurrent layers do, take `tf.map_fn`: of them it makes something that
    is no faster and takes many times longer to trace. So do those that it gives up on.
    """
    structure = (features, label, sample_weight)
    batch = nests.present(structure)
    position = {id(v): i for i, v in enumerate(variables)}

    def one(values: list[tf.Tensor], example: list[tf.Tensor]) -> list[tf.Tensor]:
        sources = [values[position[id(w.variable)]] for w in weights]
        single = nests.repack(structure, [tf.expand_dims(x, 0) for x in example])
        tape = tf.GradientTape(watch_accessed_variables=False)
        with keras.StatelessScope(list(zip(variables, values, strict=True))), tape:
            for source in sources:
                tape.watch(source)
            quantity, _ = forward(*single)
            total = tf.reduce_sum(quantity)
        gradients = tape.gradient(total, sources, unconnected_gradients="zero")
        return [tf.cast(tf.convert_to_tensor(g), tf.float32) for g in gradients]

    signature = [
        [tf.TensorSpec(x.shape, x.dtype) for x in values],
        [tf.TensorSpec(x.shape[1:], x.dtype) for x in batch],
    ]
    function = tf.function(one, input_signature=signature, autograph=False)
    traced = function.get_concrete_function()

    def gradients(example: list[tf.Tensor]) -> list[tf.Tensor]:
        return traced(list(values), example)

    stacked = None
    if not _has_loops(traced):
        with contextlib.suppress(Exception):  # its converters fail in many ways, while tracing
            stacked = tf.vectorized_map(gradients, batch)
    if stacked is None:
        outputs = [tf.TensorSpec(w.shape, tf.float32) for w in weights]
        stacked = tf.map_fn(gradients, batch, fn_output_signature=outputs)
    return [
        forms.full(tf.ensure_shape(g, [None, *w.shape]))
        for g, w in zip(stacked, weights, strict=True)
    ]


def _has_loops(traced: Any) -> bool:
    graph = traced.graph.as_graph_def()
    nodes = [graph.node, *(function.node_def for function in graph.library.function)]
    return any(node.op in ("While", "StatelessWhile") for part in nodes for node in part)


@contextlib.contextmanager
def _recording(
    layers: Sequence[keras.layers.Layer],
    tape: tf.GradientTape,
    value_of: dict[int, tf.Tensor],
    batch_size: int,
) -> Iterator[list[_Call]]:
    """Records the calls of these layers, which have a rule, while the model is being traced."""
    calls: list[_Call] = []
    graph = tf.compat.v1.get_default_graph()

    def recorded(layer: Any, call: Callable[..., Any]) -> Callable[..., Any]:
        rule = rule_for(layer)
        assert rule is not None

        def wrapper(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            # In a loop's body or a nested function a tensor is not the whole batch's.
            if tf.compat.v1.get_default_graph() is not graph or not tf.is_tensor(inputs):
                return call(inputs, *args, **kwargs)
            if inputs.shape[:1] != [batch_size]:
                return call(inputs, *args, **kwargs)
            scope = get_stateless_scope()
            current = [(v, scope.get_current_value(v)) for v in layer.variables]
            # A weight that the model has overwritten is a function of other weights.
            if any(value is not value_of[id(v)] for v, value in current if v.trainable):
                return call(inputs, *args, **kwargs)
            own = [(v, tf.stop_gradient(value)) for v, value in current]
            with keras.StatelessScope(own), _without_activation(layer) as activation:
                outputs = call(inputs, *args, **kwargs)
            tape.watch(outputs)
            calls.append(_Call(layer, rule, inputs, outputs))
            return outputs if activation is None else activation(outputs)

        return wrapper

    with _replaced_calls(layers, recorded):
        yield calls


@contextlib.contextmanager
def _replaced_calls(
    layers: Sequence[keras.layers.Layer],
    replacement: Callable[[Any, Callable[..., Any]], Callable[..., Any]],
) -> Iterator[None]:
    """Replaces `call` on the instances: the model must belong to the caller alone."""
    replaced = []
    try:
        for layer in layers:
            object.__setattr__(layer, "call", replacement(layer, layer.call))
            replaced.append(layer)
        yield
    finally:
        for layer in replaced:
            object.__delattr__(layer, "call")


def _layers(weights: Sequence[Weight]) -> list[keras.layers.Layer]:
    return list({id(w.layer): w.layer for w in weights}.values())


@contextlib.contextmanager
def _without_activation(layer: Any) -> Iterator[Callable[[tf.Tensor], tf.Tensor] | None]:
    activation = getattr(layer, "activation", None)
    if activation is None:
        yield None
        return
    object.__setattr__(layer, "activation", None)
    try:
        yield activation
    finally:
        object.__setattr__(layer, "activation", activation)
