"""One forward pass of a model, with every call of a layer recorded.

The weights are arguments, not state: each variable's value is put in its place by a
`keras.StatelessScope`. So one traced function serves every checkpoint, from several threads at
a time. Within a call that takes its layer's rule the layer's weights are tensors of that call's
own, so that what else is done with a weight is seen: in the graph, that is all that is left.
"""

import collections
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import get_stateless_scope

from tracin_beam.gradients import loops, nests, recurrent
from tracin_beam.gradients.rules import Rule, rule_for

# Where Keras counts how many layers of a type it has named.
_NAMES = "object_name_uids"

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
class Model:
    """What the gradients are of, and how it runs.

    Attributes:
      layers: all layers of the model.
      variables: all variables of the model.
      weights: the trainable weights that are wanted.
      rules: whether layers take their rules and weights those of their uses; without, all weights
        take the product for each example of the whole model.
      adding: ids of layers whose calls add to the loss, which the gradient of their output misses.
      not_first: ids of layers that do not give out the examples first, though they were given so.
      loops: whether loops are left such; otherwise they are written out step by step.
    """

    layers: Sequence[keras.layers.Layer]
    variables: Sequence[keras.Variable]
    weights: Sequence[Weight]
    rules: bool = True
    adding: frozenset[int] = frozenset()
    not_first: frozenset[int] = frozenset()
    loops: bool = True

    @classmethod
    def of(
        cls,
        model: keras.Model,
        weights: Sequence[Weight],
        rules: bool = True,
        adding: frozenset[int] = frozenset(),
    ) -> "Model":
        """Of a built model and some of its weights."""
        layers = list(model._flatten_layers())
        return cls(layers, list(model.variables), list(weights), rules, adding)

    def whole(self, layer: keras.layers.Layer) -> bool:
        """Whether all that the layer does with its weights is seen in its output's gradient."""
        return not any(id(inner) in self.adding for inner in layer._flatten_layers())


@dataclasses.dataclass(frozen=True)
class Ruled:
    """A call that may take its layer's rule; own are its weights, tensors of this call alone."""

    layer: keras.layers.Layer
    rule: Rule
    inputs: tf.Tensor
    outputs: tf.Tensor
    own: Sequence[tuple[keras.Variable, tf.Tensor]]


@dataclasses.dataclass(frozen=True)
class Looped:
    """A call of a recurrent layer; own as above."""

    steps: recurrent.Steps
    own: Sequence[tuple[keras.Variable, tf.Tensor]]


@dataclasses.dataclass(frozen=True)
class Frame:
    """A call of any layer: its operations have numbers in (first, last]."""

    layer: keras.layers.Layer
    call: Callable[..., Any]
    arguments: Any
    outputs: Any
    first: int
    last: int


@dataclasses.dataclass
class Recording:
    """A forward pass.

    Attributes:
      size: number of examples.
      leads: whether a tensor has the examples first, and nothing else along that axis.
      value_of: by id of a variable, its value.
    """

    graph: Any
    size: int
    leads: Callable[[tf.Tensor], bool]
    value_of: dict[int, tf.Tensor]
    flat: Sequence[tf.Tensor] = ()
    quantity: Any = None
    auxiliary: Any = None
    ruled: list[Ruled] = dataclasses.field(default_factory=list)
    looped: list[Looped] = dataclasses.field(default_factory=list)
    frames: list[Frame] = dataclasses.field(default_factory=list)
    assumed: list[keras.layers.Layer] = dataclasses.field(default_factory=list)
    stepping: bool = False  # within a recurrent layer, whose steps are recorded

    def clean(self, variables: Sequence[keras.Variable]) -> bool:
        """Whether the model has overwritten none of these, which makes it a function of others."""
        scope = get_stateless_scope()
        return all(
            scope.get_current_value(v) is self.value_of.get(id(v)) for v in variables if v.trainable
        )


def pooled_inputs(
    layers: Sequence[keras.layers.Layer], run: Callable[[], Any], size: int, last: int
) -> list[tf.Tensor]:
    """What the last layers with a matrix of weights are given, averaged over positions.

    Args:
      layers: of the model.
      run: runs the model on a batch, in the graph that is being traced.
      size: examples of the batch.
      last: how many layers, by the order in which they are called.

    Returns:
      float32 [size, channels] of each, over the root of its number of channels.
    """
    graph = tf.compat.v1.get_default_graph()
    found: list[tf.Tensor] = []

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        @tf.autograph.experimental.do_not_convert
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if tf.compat.v1.get_default_graph() is graph:  # not in a loop's body
                given = [x for x in float_tensors((args, kwargs)) if x.shape.rank]
                found.extend(x for x in given[:1] if x.shape.rank > 1 and x.shape[0] == size)
            return call(*args, **kwargs)

        return wrapper

    with contextlib.ExitStack() as stack:
        for layer in {id(layer): layer for layer in layers}.values():
            if any(len(v.shape) > 1 for v in layer._trainable_variables):
                stack.enter_context(_replaced(layer, "call", watched(layer.call)))
        run()
    pooled = []
    for x in found[-last:]:
        mean = tf.reduce_mean(tf.cast(x, tf.float32), axis=list(range(1, x.shape.rank - 1)))
        width = tf.cast(tf.shape(mean)[1], tf.float32)
        pooled.append(mean / tf.sqrt(width))
    return pooled


def not_first(
    layers: Sequence[keras.layers.Layer], run: Callable[[], Any], size: int
) -> frozenset[int]:
    """Ids of those layers whose output has another first axis than the examples.

    Args:
      layers: layers.
      run: runs the model, eagerly, on so many examples.
      size: how many.
    """
    others: set[int] = set()

    def watched(layer: Any, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            outputs = call(*args, **kwargs)
            if any(x.shape.rank and x.shape[0] != size for x in tensors(outputs)):
                others.add(id(layer))
            return outputs

        return wrapper

    with contextlib.ExitStack() as stack:
        for layer in {id(layer): layer for layer in layers}.values():
            stack.enter_context(_replaced(layer, "call", watched(layer, layer.call)))
        run()
    return frozenset(others)


def record(
    model: Model,
    forward: Forward,
    values: Sequence[tf.Tensor],
    flat: Sequence[tf.Tensor],
    structure: Any,
    size: int,
    leads: Callable[[tf.Tensor], bool],
) -> Recording:
    """Runs the model on a batch, in the graph that is being made.

    Args:
      model: the model and its weights.
      forward: what is differentiated.
      values: of the model's variables, in the same order.
      flat: features, label and sample_weight where they are there.
      structure: features, label and sample_weight, as for `nests.repack`.
      size: number of examples.
      leads: whether a tensor has the examples first, and nothing else along that axis.
    """
    # Identities, so that names are the same whatever function this is traced in.
    with tf.name_scope("values"):
        value_of = {
            id(v): tf.identity(x, name="value")
            for v, x in zip(model.variables, values, strict=True)
        }
    with tf.name_scope("batch"):
        flat = [tf.identity(x, name="part") for x in flat]
    recording = Recording(tf.compat.v1.get_default_graph(), size, leads, value_of, flat)
    mapping = [(v, value_of[id(v)]) for v in model.variables]
    with _same_names(), keras.StatelessScope(mapping), _recording(model, recording):
        recording.quantity, recording.auxiliary = forward(*nests.repack(structure, flat))
    return recording


@contextlib.contextmanager
def _same_names() -> Iterator[None]:
    """Layers that a call makes, as `Flatten()(x)` does, have the same names in every trace."""
    kept = global_state.get_global_attribute(_NAMES)
    global_state.set_global_attribute(_NAMES, collections.defaultdict(int))
    try:
        yield
    finally:
        global_state.set_global_attribute(_NAMES, kept)


@contextlib.contextmanager
def _recording(model: Model, recording: Recording) -> Iterator[None]:
    """Replaces `call` on the layers' instances: the model must belong to the caller alone."""
    owned = {id(w.variable) for w in model.weights}
    with contextlib.ExitStack() as stack:

        def replace(layer: Any, name: str, by: Callable[..., Any]) -> None:
            stack.enter_context(_replaced(layer, name, by))

        def unrolled() -> bool:
            inside = tf.compat.v1.get_default_graph() is recording.graph
            return inside and not recording.stepping

        if not model.loops:
            stack.enter_context(loops.written_out(unrolled))
        for layer in model.layers:
            wanted = model.rules and model.whole(layer)
            if wanted and recurrent.takes(layer):
                replace(layer, "inner_loop", _looped(layer, layer.inner_loop, recording))
            own = any(id(v) in owned for v in layer._trainable_variables)
            rule = rule_for(layer) if own and wanted else None
            stated = id(layer) not in model.not_first
            replace(layer, "call", _recorded(layer, layer.call, rule, stated, recording))
        yield


@contextlib.contextmanager
def _replaced(layer: Any, name: str, by: Any) -> Iterator[None]:
    """Replaces an attribute of the instance, which may have been its own before."""
    own = vars(layer).get(name)
    object.__setattr__(layer, name, by)
    try:
        yield
    finally:
        object.__delattr__(layer, name)
        if own is not None:
            object.__setattr__(layer, name, own)


def _recorded(
    layer: Any, call: Callable[..., Any], rule: Rule | None, stated: bool, recording: Recording
) -> Callable[..., Any]:
    @tf.autograph.experimental.do_not_convert
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        # In a loop's body or a nested function a tensor is not the whole batch's.
        if tf.compat.v1.get_default_graph() is not recording.graph:
            return call(*args, **kwargs)
        if not recording.clean(layer.variables):
            return call(*args, **kwargs)
        first = recording.graph.version + 1
        inputs = args[0] if args else None
        if rule is not None and tf.is_symbolic_tensor(inputs) and recording.leads(inputs):
            own = [(v, tf.identity(recording.value_of[id(v)])) for v in layer.variables]
            with keras.StatelessScope(own), _without_activation(layer) as activation:
                outputs = call(*args, **kwargs)
            recording.ruled.append(Ruled(layer, rule, inputs, outputs, own))
            outputs = outputs if activation is None else activation(outputs)
        else:
            outputs = call(*args, **kwargs)
            if stated:
                outputs = _with_examples_first(layer, args, outputs, recording)
        last = recording.graph.version + 1
        recording.frames.append(Frame(layer, call, (args, kwargs), outputs, first, last))
        return outputs

    return wrapper


def _with_examples_first(layer: Any, args: Any, outputs: Any, recording: Recording) -> Any:
    """States the number of examples where the layer, as one that splits text, leaves it open."""
    given = tensors(args)
    if not given or not recording.leads(given[0]):
        return outputs

    def stated(x: Any) -> Any:
        if not (isinstance(x, tf.Tensor) and x.shape.rank and x.shape[0] is None):
            return x
        recording.assumed.append(layer)
        return tf.ensure_shape(x, [recording.size, *x.shape[1:]])

    return tf.nest.map_structure(stated, outputs)


def _looped(layer: Any, loop: Callable[..., Any], recording: Recording) -> Callable[..., Any]:
    def wrapper(
        sequences: Any, initial_state: Any, mask: Any = None, training: bool = False
    ) -> Any:
        inside = tf.compat.v1.get_default_graph() is recording.graph
        usable = inside and tf.is_symbolic_tensor(sequences) and recording.leads(sequences)
        if not usable or not recording.clean(layer.variables):
            return loop(
                sequences=sequences, initial_state=initial_state, mask=mask, training=training
            )
        own = [(v, tf.identity(recording.value_of[id(v)])) for v in layer.variables]

        def keep(steps: recurrent.Steps) -> None:
            recording.looped.append(Looped(steps, own))

        recording.stepping = True
        try:
            with keras.StatelessScope(own):
                return recurrent.inner_loop(layer, keep)(sequences, initial_state, mask, training)
        finally:
            recording.stepping = False

    return wrapper


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


def composites(structure: Any) -> list[Any]:
    """All tensors in it, ragged and sparse ones as they are."""
    return [x for x in tf.nest.flatten(structure) if tf.is_tensor(x)]


def tensors(structure: Any) -> list[tf.Tensor]:
    """The tensors of a graph in it."""
    return [x for x in tf.nest.flatten(structure) if tf.is_symbolic_tensor(x)]


def float_tensors(structure: Any) -> list[tf.Tensor]:
    """Those that have gradients."""
    return [x for x in tensors(structure) if x.dtype.is_floating]
