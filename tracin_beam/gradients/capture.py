"""One forward and one backward pass that give each example's gradient of each weight.

The model runs once over the batch with every call of a layer recorded (`recording`). Then each
weight's gradient comes, in this order of preference,

    from its layer's rule          (`rules`): the layer's input and its output gradients
    from the operations it is in   (`uses`), whatever layers these belong to
    from the recurrent layer's     (`recurrent`): its steps all at once
    from a product for each example (`general`): of the smallest layer around it, or of the model

One backward pass, of the summed per-example losses to all outputs that these need, gives every
example's output gradients at once.

Where a tensor has the examples is seen by tracing the model for two numbers of examples
(`layouts.TwoTraces`). The batch size alone would not tell: of a layer that sees the time first, as
many steps may be given as the batch has examples.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from tracin_beam.gradients import forms, general, layouts, loops, nests, uses
from tracin_beam.gradients.forms import Form
from tracin_beam.gradients.recording import (
    Forward,
    Frame,
    Looped,
    Model,
    Recording,
    Weight,
    composites,
    float_tensors,
    record,
    tensors,
)
from tracin_beam.gradients.traceable import seen_through

# The other number of examples that a model is traced for: a prime that no axis is a multiple of.
EXAMPLES = 1009


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
      loops: whether the model has loops.
    """

    shapes: Mapping[str, tf.TensorShape]
    outputs: int
    forms: Mapping[int, Form]
    dots: Mapping[int, Form]
    general: Mapping[int, keras.layers.Layer | None]
    assumed: Sequence[keras.layers.Layer]
    loops: bool
    _refused: frozenset[int]  # numbers of ruled calls that the rule is not for
    _frames: Mapping[int, Sequence[int]]  # by number of a call, the weights that it is run for


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
    with graph.as_default(), seen_through():
        flat = [tf.compat.v1.placeholder(x.dtype, [EXAMPLES, *x.shape[1:]]) for x in specs]
        values = [tf.compat.v1.placeholder(v.dtype, v.shape) for v in model.variables]

        def leads(x: tf.Tensor) -> bool:
            return x.shape.rank is not None and x.shape[:1] == [EXAMPLES]

        recorded = record(model, forward, values, flat, structure, EXAMPLES, leads)
        outputs = general.size_of(graph.get_operations(), EXAMPLES)
        everything = dict.fromkeys(range(len(model.weights)))
        if not model.rules:
            return Survey({}, outputs, {}, {}, everything, recorded.assumed, False, frozenset(), {})
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
            loops.any_in(graph),
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


@seen_through()
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

    recorded = record(model, forward, values, flat, structure, size, leads)
    total = tf.reduce_sum(recorded.quantity)
    whole = set(found.general)
    gradients: dict[int, Form] = {}
    if model.rules:
        frames = [recorded.frames[number] for number in found._frames]
        of_frames: list[list[tf.Tensor | None]] = []

        def differentiate(outputs: Sequence[tf.Tensor]) -> list[tf.Tensor | None]:
            ends = [float_tensors(frame.outputs) for frame in frames]
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


Differentiate = Callable[[Sequence[tf.Tensor]], list[tf.Tensor | None]]


def _as_if(outputs: Sequence[tf.Tensor]) -> list[tf.Tensor | None]:
    """Gradients of the right shapes, where only these matter."""
    return [tf.zeros_like(x) for x in outputs]


def _fast(
    model: Model,
    recorded: Recording,
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
    dependent = layouts.data_dependent(recorded.flat)
    traces = layouts.TwoTraces(shapes, EXAMPLES, dependent)
    batch = layouts.Batch(recorded.size, traces.layout, traces.shared)

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
    recorded: Recording,
    loop: Looped,
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
    dependent = layouts.data_dependent(rows) | {x.op.name for x in rows}
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

    batch = layouts.Batch(
        recorded.size, lambda x: layouts.Layout(0, count) if leads(x) else None, shared
    )
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
    model: Model, recorded: Recording, shapes: Any, operations: Sequence[tf.Operation]
) -> list[int]:
    """Numbers of the smallest calls that have these operations; none if some are in none."""
    traces = layouts.TwoTraces(shapes, EXAMPLES, layouts.data_dependent(recorded.flat))
    usable = [
        number
        for number, frame in enumerate(recorded.frames)
        if model.whole(frame.layer)
        and all(recorded.leads(x) or traces.shared(x) for x in tensors(frame.arguments))
        and all(isinstance(x, tf.Tensor) for x in composites((frame.arguments, frame.outputs)))
        and all(recorded.leads(x) for x in tensors(frame.outputs) if x.dtype.is_floating)
        and any(recorded.leads(x) for x in tensors(frame.arguments))
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


def _of_frame(
    model: Model,
    recorded: Recording,
    frame: Frame,
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
            ends = float_tensors(frame.call(*args, **kwargs))
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
