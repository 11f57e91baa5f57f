"""One forward and one backward pass that give each example's gradient of each weight.

The model runs once over the batch with every call of a layer recorded. Then each weight's gradient
comes, in this order of preference,

    from its layer's rule          (`rules`): the layer's input and its output gradients
    from the operations it is in   (`uses`), whatever layers these belong to
    from the recurrent layer's     (`recurrent`): its steps all at once
    from a product for each example (`general`): of the smallest layer around it, or of the model

One backward pass, of the summed per-example losses to all outputs that these need, gives every
example's output gradients at once.

The weights are arguments, not state: each variable's value is put in its place by a
`keras.StatelessScope`. So one traced function serves every checkpoint, from several threads at
a time. Within a call that takes its layer's rule the layer's weights are tensors of that call's
own, so that what else is done with a weight is seen: in the graph, that is all that is left.

Where a tensor has the examples is seen by tracing the model for two numbers of examples
(`uses.TwoTraces`). The batch size alone would not tell: of a layer that sees the time first, as
many steps may be given as the batch has examples.
"""

import contextlib
import dataclasses
import inspect
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common.stateless_scope import get_stateless_scope
from tensorflow.python.autograph.core import converter
from tensorflow.python.autograph.impl import api
from tensorflow.python.eager.polymorphic_function.polymorphic_function import Function
from tensorflow.python.ops import custom_gradient

from tracin_beam.gradients import forms, general, nests, recurrent, uses
from tracin_beam.gradients.forms import Form
from tracin_beam.gradients.rules import Rule, rule_for

# (features, label, sample_weight) -> [B] quantities to be differentiated, and anything else.
Forward = Callable[[Any, Any, Any], tuple[tf.Tensor, Any]]

# The other number of examples that a model is traced for: a prime that no axis is a multiple of.
EXAMPLES = 1009


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
    """

    layers: Sequence[keras.layers.Layer]
    variables: Sequence[keras.Variable]
    weights: Sequence[Weight]
    rules: bool = True
    adding: frozenset[int] = frozenset()
    not_first: frozenset[int] = frozenset()

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
class Captured:
    """What one forward and backward pass gave.

    Attributes:
      quantity: float32 [B], the per-example quantity that was differentiated.
      auxiliary: what else the forward function returned.
      gradients: by index of the weight; a weight that the quantity does not depend on is absent.
      general: by index of the weights that took the general way, the layer whose call was run for
        each example, or None for the whole model.
    """

    quantity: tf.Tensor
    auxiliary: Any
    gradients: dict[int, Form]
    general: dict[int, keras.layers.Layer | None]


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a trace of the model for EXAMPLES examples showed, which tracing it again needs.

    Attributes:
      shapes: by name of a tensor, its shape.
      outputs: numbers that the operations of the forward pass give out for an example.
      forms: by index of the weight, the form of its gradient, with specs in place of tensors.
      dots: the same for the form in which inner products are taken.
      general: as in `Captured`.
      assumed: layers of whose output only the run says that it has the examples first.
    """

    shapes: Mapping[str, tf.TensorShape]
    outputs: int
    forms: Mapping[int, Form]
    dots: Mapping[int, Form]
    general: Mapping[int, keras.layers.Layer | None]
    assumed: Sequence[keras.layers.Layer]
    _refused: frozenset[int]  # numbers of ruled calls that the rule is not for
    _frames: Mapping[int, Sequence[int]]  # by number of a call, the weights that it is run for


@dataclasses.dataclass(frozen=True)
class _Ruled:
    """A call that may take its layer's rule; own are its weights, tensors of this call alone."""

    layer: keras.layers.Layer
    rule: Rule
    inputs: tf.Tensor
    outputs: tf.Tensor
    own: Sequence[tuple[keras.Variable, tf.Tensor]]


@dataclasses.dataclass(frozen=True)
class _Looped:
    """A call of a recurrent layer; own as above."""

    steps: recurrent.Steps
    own: Sequence[tuple[keras.Variable, tf.Tensor]]


@dataclasses.dataclass(frozen=True)
class _Frame:
    """A call of any layer: its operations have numbers in (first, last]."""

    layer: keras.layers.Layer
    call: Callable[..., Any]
    arguments: Any
    outputs: Any
    first: int
    last: int


@dataclasses.dataclass
class _Recording:
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
    ruled: list[_Ruled] = dataclasses.field(default_factory=list)
    looped: list[_Looped] = dataclasses.field(default_factory=list)
    frames: list[_Frame] = dataclasses.field(default_factory=list)
    assumed: list[keras.layers.Layer] = dataclasses.field(default_factory=list)

    def clean(self, variables: Sequence[keras.Variable]) -> bool:
        """Whether the model has overwritten none of these, which makes it a function of others."""
        scope = get_stateless_scope()
        return all(
            scope.get_current_value(v) is self.value_of.get(id(v)) for v in variables if v.trainable
        )


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
            return api.converted_call(function.python_function, args, kwargs, options=options)
        return function.python_function(*args, **kwargs)

    return call


def _as_specified(spec: Any, x: Any) -> Any:
    return tf.convert_to_tensor(x, spec.dtype) if isinstance(spec, tf.TensorSpec) else x


@contextlib.contextmanager
def _seen_through() -> Iterator[None]:
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
        _patched(Function, "__call__", call),
        _patched(custom_gradient, "_graph_mode_decorator", decorate),
    ):
        yield


def survey(
    model: Model, forward: Forward, specs: Sequence[tf.TensorSpec], structure: Any
) -> Survey:
    """Traces the model for EXAMPLES examples, without running it.

    Args:
      model: the model and its weights.
      forward: what is differentiated.
      specs: of the flat features, label and sample_weight that are there; any batch size.
      structure: features, label and sample_weight, as for `nests.repack`.
    """
    graph = tf.__internal__.FuncGraph("survey")
    with graph.as_default(), _seen_through():
        flat = [tf.compat.v1.placeholder(x.dtype, [EXAMPLES, *x.shape[1:]]) for x in specs]
        values = [tf.compat.v1.placeholder(v.dtype, v.shape) for v in model.variables]

        def leads(x: tf.Tensor) -> bool:
            return x.shape.rank is not None and x.shape[:1] == [EXAMPLES]

        recorded = _record(model, forward, values, flat, structure, EXAMPLES, leads)
        outputs = general.size_of(graph.get_operations(), EXAMPLES)
        everything = dict.fromkeys(range(len(model.weights)))
        if not model.rules:
            return Survey({}, outputs, {}, {}, everything, recorded.assumed, frozenset(), {})
        shapes = _Shapes(graph)
        found, refused, unknown = _fast(model, recorded, shapes, frozenset(), {}, _as_if)
        frames = {
            i: _innermost(model, recorded, shapes, operations) for i, operations in unknown.items()
        }
        layers = {
            i: recorded.frames[chosen[0]].layer if chosen else None for i, chosen in frames.items()
        }
        by_frame: dict[int, list[int]] = {}
        for i, chosen in frames.items():
            for number in chosen:
                by_frame.setdefault(number, []).append(i)
        added = {i: forms.add(parts, model.weights[i].shape) for i, parts in found.items()}
        return Survey(
            dict(shapes.items()),
            outputs,
            {i: forms.specs(form) for i, form in sorted(added.items())},
            {
                i: forms.specs(forms.for_dot(form, model.weights[i].shape))
                for i, form in sorted(added.items())
            },
            layers,
            recorded.assumed,
            refused,
            by_frame,
        )


class _Shapes:
    """Shapes of the tensors of a graph by name, those that are still to be made too."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph

    def get(self, name: str) -> tf.TensorShape | None:
        try:
            return self._graph.get_tensor_by_name(name).shape
        except (KeyError, ValueError):
            return None

    def items(self) -> Iterator[tuple[str, tf.TensorShape]]:
        """All there are by now."""
        for operation in self._graph.get_operations():
            for x in operation.outputs:
                yield x.name, x.shape


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
            if any(x.shape.rank and x.shape[0] != size for x in _tensors(outputs)):
                others.add(id(layer))
            return outputs

        return wrapper

    with contextlib.ExitStack() as stack:
        for layer in {id(layer): layer for layer in layers}.values():
            stack.enter_context(_replaced(layer, "call", watched(layer, layer.call)))
        run()
    return frozenset(others)


@_seen_through()
def per_example_gradients(
    model: Model,
    found: Survey,
    forward: Forward,
    values: Sequence[tf.Tensor],
    flat: Sequence[tf.Tensor],
    structure: Any,
) -> Captured:
    """∂quantity_b/∂w for every example b of the batch and every weight w.

    To be called first while tracing a `tf.function` whose inputs have a static batch size.

    Args:
      model: the model and its weights.
      found: what the survey of the same model showed.
      forward: (features, label, sample_weight) -> (quantity [B], auxiliary), running the model.
      values: the values of the model's variables, in the same order.
      flat: the batch: features, label and sample_weight where they are there, as a flat list.
      structure: features, label and sample_weight, as for `nests.repack`.
    """
    size = int(flat[0].shape[0])

    def leads(x: tf.Tensor) -> bool:
        known = found.shapes.get(x.name)
        return known is not None and bool(known.rank) and known[0] == EXAMPLES

    recorded = _record(model, forward, values, flat, structure, size, leads)
    total = tf.reduce_sum(recorded.quantity)
    whole = set(found.general)
    gradients: dict[int, Form] = {}
    if model.rules:
        frames = [recorded.frames[number] for number in found._frames]
        of_frames: list[list[tf.Tensor | None]] = []

        def differentiate(outputs: Sequence[tf.Tensor]) -> list[tf.Tensor | None]:
            ends = [_float_tensors(frame.outputs) for frame in frames]
            given = tf.gradients(total, [*outputs, *(x for end in ends for x in end)])
            given = [None if g is None else tf.convert_to_tensor(g) for g in given]
            rest = iter(given[len(outputs) :])
            of_frames[:] = [[next(rest) for _ in end] for end in ends]
            return given[: len(outputs)]

        parts, _, unknown = _fast(
            model, recorded, found.shapes, found._refused, found.general, differentiate
        )
        whole |= set(unknown)
        for frame, given, chosen in zip(frames, of_frames, found._frames.values(), strict=True):
            for i, form in _of_frame(model, recorded, frame, given, chosen).items():
                parts.setdefault(i, []).append(form)
            whole -= set(chosen)
        gradients = {i: forms.add(parts[i], model.weights[i].shape) for i in sorted(parts)}
    if whole:
        order = sorted(whole)
        slow = whole_model(
            forward,
            model.variables,
            values,
            [model.weights[i] for i in order],
            flat,
            structure,
            found.outputs,
        )
        gradients.update(zip(order, slow, strict=True))
    by_layer = {i: found.general.get(i) for i in sorted({*found.general, *whole})}
    return Captured(recorded.quantity, recorded.auxiliary, gradients, by_layer)


def _record(
    model: Model,
    forward: Forward,
    values: Sequence[tf.Tensor],
    flat: Sequence[tf.Tensor],
    structure: Any,
    size: int,
    leads: Callable[[tf.Tensor], bool],
) -> _Recording:
    # Identities, so that names are the same whatever function this is traced in.
    with tf.name_scope("values"):
        value_of = {
            id(v): tf.identity(x, name="value")
            for v, x in zip(model.variables, values, strict=True)
        }
    with tf.name_scope("batch"):
        flat = [tf.identity(x, name="part") for x in flat]
    recording = _Recording(tf.compat.v1.get_default_graph(), size, leads, value_of, flat)
    mapping = [(v, value_of[id(v)]) for v in model.variables]
    with keras.StatelessScope(mapping), _recording(model, recording):
        recording.quantity, recording.auxiliary = forward(*nests.repack(structure, flat))
    return recording


@contextlib.contextmanager
def _recording(model: Model, recording: _Recording) -> Iterator[None]:
    """Replaces `call` on the layers' instances: the model must belong to the caller alone."""
    owned = {id(w.variable) for w in model.weights}
    with contextlib.ExitStack() as stack:

        def replace(layer: Any, name: str, by: Callable[..., Any]) -> None:
            stack.enter_context(_replaced(layer, name, by))

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


@contextlib.contextmanager
def _patched(owner: Any, name: str, by: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, by)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _recorded(
    layer: Any, call: Callable[..., Any], rule: Rule | None, stated: bool, recording: _Recording
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
            recording.ruled.append(_Ruled(layer, rule, inputs, outputs, own))
            outputs = outputs if activation is None else activation(outputs)
        else:
            outputs = call(*args, **kwargs)
            if stated:
                outputs = _with_examples_first(layer, args, outputs, recording)
        last = recording.graph.version + 1
        recording.frames.append(_Frame(layer, call, (args, kwargs), outputs, first, last))
        return outputs

    return wrapper


def _with_examples_first(layer: Any, args: Any, outputs: Any, recording: _Recording) -> Any:
    """States the number of examples where the layer, as one that splits text, leaves it open."""
    given = _tensors(args)
    if not given or not recording.leads(given[0]):
        return outputs

    def stated(x: Any) -> Any:
        if not (isinstance(x, tf.Tensor) and x.shape.rank and x.shape[0] is None):
            return x
        recording.assumed.append(layer)
        return tf.ensure_shape(x, [recording.size, *x.shape[1:]])

    return tf.nest.map_structure(stated, outputs)


def _looped(layer: Any, loop: Callable[..., Any], recording: _Recording) -> Callable[..., Any]:
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

        def record(steps: recurrent.Steps) -> None:
            recording.looped.append(_Looped(steps, own))

        with keras.StatelessScope(own):
            return recurrent.inner_loop(layer, record)(sequences, initial_state, mask, training)

    return wrapper


Differentiate = Callable[[Sequence[tf.Tensor]], list[tf.Tensor | None]]


def _as_if(outputs: Sequence[tf.Tensor]) -> list[tf.Tensor | None]:
    """Gradients of the right shapes, where only these matter."""
    return [tf.zeros_like(x) for x in outputs]


def _fast(
    model: Model,
    recorded: _Recording,
    shapes: Any,
    refused: frozenset[int],
    skipped: Mapping[int, Any],
    differentiate: Differentiate,
) -> tuple[dict[int, list[Form]], frozenset[int], dict[int, list[tf.Operation]]]:
    """By rules, by uses and by steps.

    Args:
      model: the model and its weights.
      recorded: its forward pass.
      shapes: by name of a tensor, its shape in the trace for EXAMPLES examples.
      refused: which of the ruled calls the rule is not for.
      skipped: indices of weights that go the general way anyway.
      differentiate: gives the gradients with respect to these tensors.

    Returns:
      Parts of the gradients by index of the weight; which ruled calls the rule was not for; and
      by index of the weights that are not known, the operations for which no rule is.
    """
    index = {id(w.variable): i for i, w in enumerate(model.weights)}
    sources = [recorded.value_of[id(w.variable)] for w in model.weights]
    dependent = uses.data_dependent(recorded.flat)
    traces = uses.TwoTraces(shapes, EXAMPLES, dependent)
    batch = uses.Batch(recorded.size, traces.layout, traces.shared)

    # What rules and steps take care of is not looked for among the other uses.
    covered = {
        x.op.name
        for number, call in enumerate(recorded.ruled)
        if number not in refused
        for v, x in call.own
    }
    covered |= {x.op.name for call in recorded.looped for _, x in call.own}
    found = uses.find(sources, traces.shared, covered)
    ends = uses.outputs(found)
    zeros = [zero for call in recorded.looped for zero in call.steps.zeros]
    wanted = [*(call.outputs for call in recorded.ruled), *zeros, *ends]
    given = differentiate(wanted)
    of_ruled = given[: len(recorded.ruled)]
    of_zeros = iter(given[len(recorded.ruled) : len(given) - len(ends)])
    of_ends = dict(zip([x.name for x in ends], given[len(given) - len(ends) :], strict=True))

    # A weight has the same form whatever is differentiated: where only some of its uses matter,
    # the others give zeros. One without any is left out.
    alive = {
        o.name: o for o in found.uses if any(of_ends.get(x.name) is not None for x in o.outputs)
    }
    touched = set(uses.missing(found, alive))
    for call, g in zip(recorded.ruled, of_ruled, strict=True):
        if g is not None:
            touched |= {index[id(v)] for v in call.layer._trainable_variables if id(v) in index}
    touched -= set(skipped)
    for x in ends:
        dead = of_ends[x.name] is None and x.op.name not in alive
        if dead and touched & set(uses.missing(found, {x.op.name: x.op})):
            of_ends[x.name] = tf.zeros_like(x)

    parts: dict[int, list[Form]] = {}
    refusing: set[int] = set(refused)
    unknown: dict[int, list[tf.Operation]] = {}
    scope = [(v, recorded.value_of[id(v)]) for v in model.variables]
    with keras.StatelessScope(scope):
        for number, (call, g) in enumerate(zip(recorded.ruled, of_ruled, strict=True)):
            mine = {index[id(v)] for v in call.layer._trainable_variables if id(v) in index}
            if number in refused or not mine & touched:
                continue
            try:
                g = tf.zeros_like(call.outputs) if g is None else g
                contributions = call.rule(call.layer, call.inputs, g)
            except NotImplementedError:
                contributions = []
            if mine - {index[id(v)] for v, _ in contributions if id(v) in index}:
                refusing.add(number)
                continue
            for variable, form in contributions:
                if id(variable) in index:
                    parts.setdefault(index[id(variable)], []).append(form)
    if refusing - refused:
        # Their weights' uses are ordinary operations after all.
        return _fast(model, recorded, shapes, frozenset(refusing), skipped, differentiate)

    results, failed = uses.gradients(found, of_ends, batch)
    for i, result in enumerate(results):
        if result is not None and i in touched:
            parts.setdefault(i, []).append(result)
    for i in uses.missing(found, failed):
        unknown[i] = []

    for number, loop in enumerate(recorded.looped):
        of_sums = [next(of_zeros) for _ in loop.steps.zeros]
        if any(g is not None for g in of_sums):
            with tf.name_scope(f"steps_{number}"):
                _steps(model, recorded, loop, of_sums, shapes, differentiate, parts, unknown)
    # Whoever goes the general way goes it with all uses.
    unknown = {i: [] for i in unknown if i not in skipped}
    for operation in found.uses:
        for i in unknown.keys() & set(uses.missing(found, {operation.name: operation})):
            unknown[i].append(operation)
    for owns in (*(call.own for call in recorded.ruled), *(loop.own for loop in recorded.looped)):
        for v, x in owns:
            if index.get(id(v)) in unknown and x.op.name in covered:
                unknown[index[id(v)]].append(x.op)
    for i in {*unknown, *skipped}:
        parts.pop(i, None)
    return parts, frozenset(refusing), unknown


def _steps(
    model: Model,
    recorded: _Recording,
    loop: _Looped,
    of_sums: Sequence[tf.Tensor | None],
    shapes: Any,
    differentiate: Differentiate,
    parts: dict[int, list[Form]],
    unknown: dict[int, list[tf.Operation]],
) -> None:
    """Adds what a recurrent layer's steps give, or what of its weights is not known."""
    steps = loop.steps
    own = {id(v): tf.identity(recorded.value_of[id(v)]) for v, _ in loop.own}
    mapping = [(v, own[id(v)]) for v, _ in loop.own]
    with keras.StatelessScope(mapping):
        rows, given = steps.replay()
    chosen = [i for i, w in enumerate(model.weights) if id(w.variable) in own]
    sources = [own[id(model.weights[i].variable)] for i in chosen]
    dependent = uses.data_dependent(rows) | {x.op.name for x in rows}
    count = steps.inputs.shape[1]

    def leads(x: tf.Tensor) -> bool:
        shape = shapes.get(x.name)
        if shape is None or not shape.rank:
            return False
        if shape[0] is None:
            return x.op.name in dependent
        return bool(shape[0] == EXAMPLES * (count or 0))

    def shared(x: tf.Tensor) -> bool:
        shape = shapes.get(x.name)
        return x.op.name not in dependent and shape is not None and not leads(x)

    batch = uses.Batch(recorded.size, lambda x: uses.Layout(0, count) if leads(x) else None, shared)
    found = uses.find(sources, shared, set())
    ends = uses.outputs(found)
    pairs = [(y, g) for y, g in zip(given, of_sums, strict=True) if g is not None]
    if differentiate is _as_if:
        of_ends = _as_if(ends)
    else:
        of_ends = tf.gradients(
            [y for y, _ in pairs],
            ends,
            [tf.reshape(tf.cast(g, y.dtype), tf.shape(y)) for y, g in pairs],
        )
    of_ends = [
        tf.zeros_like(x) if g is None else tf.convert_to_tensor(g)
        for x, g in zip(ends, of_ends, strict=True)
    ]
    results, failed = uses.gradients(
        found, dict(zip([x.name for x in ends], of_ends, strict=True)), batch
    )
    for i, result in zip(chosen, results, strict=True):
        if result is not None:
            parts.setdefault(i, []).append(result)
    for k in uses.missing(found, failed):
        unknown[chosen[k]] = []


def _innermost(
    model: Model, recorded: _Recording, shapes: Any, operations: Sequence[tf.Operation]
) -> list[int]:
    """Numbers of the smallest calls that have these operations; none if some are in none."""
    traces = uses.TwoTraces(shapes, EXAMPLES, uses.data_dependent(recorded.flat))
    usable = [
        number
        for number, frame in enumerate(recorded.frames)
        if model.whole(frame.layer)
        and all(recorded.leads(x) or traces.shared(x) for x in _tensors(frame.arguments))
        and all(isinstance(x, tf.Tensor) for x in _composites((frame.arguments, frame.outputs)))
        and all(recorded.leads(x) for x in _tensors(frame.outputs) if x.dtype.is_floating)
        and any(recorded.leads(x) for x in _tensors(frame.arguments))
    ]
    chosen: set[int] = set()
    for operation in operations:
        around = [
            n for n in usable if recorded.frames[n].first < operation._id <= recorded.frames[n].last
        ]
        if not around:
            return []
        chosen.add(min(around, key=lambda n: recorded.frames[n].last - recorded.frames[n].first))
    outer = [
        n
        for n in chosen
        if not any(
            m != n
            and recorded.frames[m].first <= recorded.frames[n].first
            and recorded.frames[n].last <= recorded.frames[m].last
            for m in chosen
        )
    ]
    return sorted(outer)


def _composites(structure: Any) -> list[Any]:
    return [x for x in tf.nest.flatten(structure) if tf.is_tensor(x)]


def _tensors(structure: Any) -> list[tf.Tensor]:
    return [x for x in tf.nest.flatten(structure) if tf.is_symbolic_tensor(x)]


def _float_tensors(structure: Any) -> list[tf.Tensor]:
    return [x for x in _tensors(structure) if x.dtype.is_floating]


def _of_frame(
    model: Model,
    recorded: _Recording,
    frame: _Frame,
    of_outputs: Sequence[tf.Tensor | None],
    chosen: Sequence[int],
) -> dict[int, Form]:
    """The gradients of these weights by one layer's call, for each example by itself."""
    known = [i for i, g in enumerate(of_outputs) if g is not None]
    if not known:
        return {}
    given = tf.nest.flatten(frame.arguments)
    places = [i for i, x in enumerate(given) if tf.is_symbolic_tensor(x) and recorded.leads(x)]
    weights = [model.weights[i] for i in chosen]

    def product(example: list[tf.Tensor]) -> list[tf.Tensor]:
        inputs = list(given)
        for place, x in zip(places, example, strict=False):
            inputs[place] = tf.expand_dims(x, 0)
        args, kwargs = tf.nest.pack_sequence_as(frame.arguments, inputs)
        values = {id(v): recorded.value_of[id(v)] for v in model.variables}
        sources = [tf.identity(values[id(w.variable)]) for w in weights]
        values |= {id(w.variable): x for w, x in zip(weights, sources, strict=True)}
        tape = tf.GradientTape(watch_accessed_variables=False)
        with keras.StatelessScope([(v, values[id(v)]) for v in model.variables]), tape:
            for source in sources:
                tape.watch(source)
            ends = _float_tensors(frame.call(*args, **kwargs))
            products = [
                tf.reduce_sum(tf.cast(ends[i], tf.float32) * tf.cast(g, tf.float32)[None])
                for i, g in zip(known, example[len(places) :], strict=True)
            ]
            total = tf.add_n(products)
        found = tape.gradient(total, sources, unconnected_gradients="zero")
        return [tf.cast(tf.convert_to_tensor(g), tf.float32) for g in found]

    inside = [o for o in recorded.graph.get_operations() if frame.first < o._id <= frame.last]
    numbers = general.size_of(inside, recorded.size) + sum(w.size for w in weights)
    batch = [*(given[i] for i in places), *(of_outputs[i] for i in known)]
    found = general.per_example(product, batch, [w.shape for w in weights], numbers)
    return {i: forms.full(x) for i, x in zip(chosen, found, strict=True)}


def whole_model(
    forward: Forward,
    variables: Sequence[keras.Variable],
    values: Sequence[tf.Tensor],
    weights: Sequence[Weight],
    flat: Sequence[tf.Tensor],
    structure: Any,
    numbers: int,
) -> list[forms.Full]:
    """The last resort: the whole model and its gradient for each example as a batch of one.

    Args:
      numbers: how many numbers the model holds for an example.
    """

    def one(example: list[tf.Tensor]) -> list[tf.Tensor]:
        given = {id(v): x for v, x in zip(variables, values, strict=True)}
        sources = [tf.identity(given[id(w.variable)]) for w in weights]
        given |= {id(w.variable): x for w, x in zip(weights, sources, strict=True)}
        single = nests.repack(structure, [tf.expand_dims(x, 0) for x in example])
        tape = tf.GradientTape(watch_accessed_variables=False)
        with keras.StatelessScope([(v, given[id(v)]) for v in variables]), tape:
            for source in sources:
                tape.watch(source)
            quantity, _ = forward(*single)
            total = tf.reduce_sum(quantity)
        gradients = tape.gradient(total, sources, unconnected_gradients="zero")
        return [tf.cast(tf.convert_to_tensor(g), tf.float32) for g in gradients]

    numbers += sum(w.size for w in weights)
    found = general.per_example(one, flat, [w.shape for w in weights], numbers)
    return [forms.full(x) for x in found]


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
