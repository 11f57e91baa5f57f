"""Losses that a model adds to the task's: `add_loss`, activity and weight regularisers.

Keras trains on the loss of the batch plus every such number as it is. ℓ(z) is what it would be for
a batch of z alone: the task's loss of z plus what the layers add for z. An added number that is
the mean over the batch, as activity regularisers are, has that very sum over the batch divided by
its size; one that is the sum over the batch counts in training, beside a loss that is a mean,
the batch size times as much as it does for an example alone.

What depends on weights alone, as weight regularisers do, belongs to no example and is left out.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from tracin_beam.errors import InputError
from tracin_beam.gradients import layouts, nests


@dataclasses.dataclass(frozen=True)
class Added:
    """A number that a layer adds to the loss, each time that the model runs.

    Attributes:
      layer: which adds it.
      kind: "mean" or "sum" over the examples of a batch, "each" a number for each of them, or
        "weights", which depends on no example.
      inside: whether the layer's own call adds it, and not an activity regulariser after it.
    """

    layer: keras.layers.Layer
    kind: Literal["mean", "sum", "each", "weights"]
    inside: bool

    @property
    def name(self) -> str:
        return f"layer {self.layer.name!r} ({type(self.layer).__name__})"


@contextlib.contextmanager
def collecting(model: keras.Model) -> Iterator[list[tuple[Any, tf.Tensor, bool]]]:
    """Collects (layer, loss, whether from inside its call) of what is added in this block.

    The model must belong to the caller alone.
    """
    found: list[tuple[Any, tf.Tensor, bool]] = []
    running: list[Any] = []
    replaced: list[tuple[Any, str, Any]] = []

    def adder(layer: Any) -> Callable[[Any], None]:
        def add_loss(loss: Any) -> None:
            inside = any(layer is one for one in running)
            found.extend((layer, x, inside) for x in tf.nest.flatten(loss))

        return add_loss

    def caller(layer: Any, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            running.append(layer)
            try:
                return call(*args, **kwargs)
            finally:
                running.pop()

        return wrapper

    try:
        for layer in model._flatten_layers():
            for name, new in (
                ("add_loss", adder(layer)),
                ("call", caller(layer, layer.call)),
            ):
                replaced.append((layer, name, vars(layer).get(name)))
                object.__setattr__(layer, name, new)
        yield found
    finally:
        for layer, name, old in reversed(replaced):
            if old is None:
                object.__delattr__(layer, name)
            else:
                object.__setattr__(layer, name, old)


def survey(model: keras.Model, features: Any) -> list[Added]:
    """What the model adds to the loss when it runs, in that order.

    Args:
      model: a built model.
      features: of one example.
    """
    with collecting(model) as once:
        model(features, training=False)
    if not once:
        return []
    depends = _depend_on_features(model, features)
    twice = nests.map_present(lambda x: tf.repeat(x, 2, axis=0), features)
    with collecting(model) as doubled:
        model(twice, training=False)
    added = []
    for (layer, one, inside), (_, two, _), example in zip(once, doubled, depends, strict=True):
        kind: Literal["mean", "sum", "each", "weights"] = "mean"
        if not example:
            kind = "weights"
        elif two.shape.rank and two.shape[0] == 2:
            kind = "each"
        elif float(one) and abs(float(two) / float(one) - 2) < 1e-3:
            kind = "sum"
        added.append(Added(layer, kind, inside))
    return added


def _depend_on_features(model: keras.Model, features: Any) -> list[bool]:
    flat = nests.present(features)
    losses: list[tf.Tensor] = []

    @tf.function(input_signature=[tf.TensorSpec(x.shape, x.dtype) for x in flat], autograph=False)
    def run(*given: tf.Tensor) -> None:
        with collecting(model) as found:
            model(nests.repack(features, given), training=False)
        losses.extend(loss for _, loss, _ in found)

    graph = run.get_concrete_function().graph
    reached = layouts.data_dependent(graph.inputs[: len(flat)])
    return [loss.op.name in reached for loss in losses]


def shares(found: Sequence[tuple[Any, tf.Tensor, bool]], added: Sequence[Added], size: int) -> Any:
    """float32 [size]: numbers whose sum over the batch is that of the examples' added losses.

    Where a layer gives one number for the batch, each example has an equal share of it: the
    gradients of the sum are right, the single values are not; see `values`.

    Args:
      found: what was collected when the model ran on the batch.
      added: from `survey`.
      size: examples in the batch.
    """
    total = tf.zeros([size])
    for (_, loss, _), one in zip(found, added, strict=True):
        loss = tf.cast(loss, tf.float32)
        if one.kind == "mean":
            total += tf.reshape(loss, [])
        elif one.kind == "sum":
            total += tf.reshape(loss, []) / size
        elif one.kind == "each":
            total += tf.reduce_sum(tf.reshape(loss, [size, -1]), axis=1)
    return total


def values(
    found: Sequence[tuple[Any, tf.Tensor, bool]],
    added: Sequence[Added],
    size: int,
    leads: Callable[[tf.Tensor], bool],
    dependent: set[str],
) -> tf.Tensor | None:
    """What the model adds to each example's loss, from the graph in which the batch was run.

    Args:
      found: what was collected when the model ran on the batch.
      added: from `survey`.
      size: examples in the batch.
      leads: whether a tensor has the examples, and nothing else, along its first axis.
      dependent: names of the operations that depend on the examples.

    Returns:
      float32 [size]; None if a layer's number is not seen to be a sum over the batch, so that each
      example must be run by itself: see `values_alone`.
    """
    total = tf.zeros([size])
    for (_, loss, _), one in zip(found, added, strict=True):
        if one.kind == "weights":
            continue
        try:
            if one.kind == "each":
                own = tf.reshape(tf.cast(loss, tf.float32), [size, -1])
            else:
                own = _apart(loss, size, leads, dependent)
        except NotImplementedError:
            return None
        own = tf.reduce_sum(tf.reshape(own, [size, -1]), axis=1)
        total += own * size if one.kind == "mean" else own
    return total


def _apart(
    x: tf.Tensor, size: int, leads: Callable[[tf.Tensor], bool], dependent: set[str]
) -> tf.Tensor:
    """The examples' parts of a tensor that is summed over them: float32 [size, *x.shape].

    Found back from the tensor through what is linear to where the sum over the batch is taken.

    Raises:
      NotImplementedError: there is something else on the way.
    """
    if not x.shape.is_fully_defined():
        raise NotImplementedError(x.op.name)
    if x.op.name not in dependent:  # a constant: an equal part for each
        return tf.tile(tf.cast(x, tf.float32)[None] / size, [size] + [1] * x.shape.rank)
    operation, given = x.op, list(x.op.inputs)
    match operation.type:
        case "Sum" | "Mean" if leads(given[0]):
            axes = _axes(operation)
            if 0 not in axes:
                raise NotImplementedError(operation.name)
            own, others = tf.cast(given[0], tf.float32), [a for a in axes if a]
            if operation.type == "Sum":
                own = tf.reduce_sum(own, axis=others)
            else:
                own = tf.reduce_mean(own, axis=others) / size
            return tf.reshape(own, [size, *x.shape])
        case "L2Loss" if leads(given[0]):
            own = tf.square(tf.cast(given[0], tf.float32)) / 2
            return tf.reduce_sum(own, axis=list(range(1, own.shape.rank)))
        case "Sum" | "Mean":
            reduce = tf.reduce_sum if operation.type == "Sum" else tf.reduce_mean
            own = _apart(given[0], size, leads, dependent)
            own = reduce(own, axis=[1 + a for a in _axes(operation)])
            return tf.reshape(own, [size, *x.shape])
        case "Identity" | "Cast" | "Reshape" | "Squeeze" | "ExpandDims":
            return tf.reshape(_apart(given[0], size, leads, dependent), [size, *x.shape])
        case "Neg":
            return -_apart(given[0], size, leads, dependent)
        case "Mul" | "RealDiv":
            varying = [i for i, y in enumerate(given) if y.op.name in dependent]
            one, other = given[varying[0]], given[1 - varying[0]]
            divided = operation.type == "RealDiv"
            if len(varying) > 1 or (divided and varying != [0]) or one.shape != x.shape:
                raise NotImplementedError(operation.name)
            own, by = _apart(one, size, leads, dependent), tf.cast(other, tf.float32)
            return own / by if divided else own * by
        case "Add" | "AddV2" | "AddN" | "Sub":
            if any(y.shape != x.shape for y in given):
                raise NotImplementedError(operation.name)
            parts = [_apart(y, size, leads, dependent) for y in given]
            return parts[0] - parts[1] if operation.type == "Sub" else tf.add_n(parts)
    raise NotImplementedError(operation.name)


def _axes(operation: tf.Operation) -> list[int]:
    """Over which a reduction goes."""
    axes = tf.get_static_value(operation.inputs[1])
    if axes is None:
        raise NotImplementedError(operation.name)
    return [int(a) % operation.inputs[0].shape.rank for a in np.ravel(axes)]


def values_alone(model: keras.Model, added: Sequence[Added], features: Any) -> tf.Tensor:
    """As `values`, float32 [n], of any model: each example is run by itself."""

    def one(example: list[tf.Tensor]) -> tf.Tensor:
        single = nests.repack(features, [tf.expand_dims(x, 0) for x in example])
        with collecting(model) as found:
            model(single, training=False)
        return shares(found, added, 1)[0]

    return tf.map_fn(one, nests.present(features), fn_output_signature=tf.float32)


def check(model: keras.Model, added: Sequence[Added], features: Any) -> None:
    """Checks that what the model adds for a batch is made of what it adds for its examples.

    Raises:
      InputError: a layer's added loss mixes the examples of a batch, or is random.
    """
    if not any(one.kind != "weights" for one in added):
        return
    flat = nests.present(features)
    size = int(flat[0].shape[0])

    def run(indices: Sequence[int]) -> list[np.ndarray]:
        some = nests.repack(features, [tf.gather(x, list(indices)) for x in flat])
        with collecting(model) as found:
            model(some, training=False)
        return [np.asarray(loss, np.float64) for _, loss, _ in found]

    together, again = run(range(size)), run(range(size))
    alone = [run([i]) for i in range(size)]
    for place, one in enumerate(added):
        if one.kind == "weights":
            continue
        own = np.array([loss[place].sum() for loss in alone])
        whole = together[place]
        tolerance = 1e-3 * np.abs(own).mean() + 1e-30
        if not np.allclose(whole, again[place], rtol=1e-4, atol=tolerance):
            raise InputError(f"the loss that {one.name} adds is random in inference mode.")
        if one.kind == "each":
            expected: Any = own
            whole = whole.reshape(size, -1).sum(axis=1)
        else:
            expected = own.mean() if one.kind == "mean" else own.sum()
            tolerance *= 1 if one.kind == "mean" else size
        if not np.allclose(whole, expected, rtol=0, atol=tolerance):
            raise InputError(
                f"the loss that {one.name} adds (by add_loss or an activity regulariser) mixes the "
                "examples of a batch: it is neither the mean nor the sum of what it is for each "
                "of them alone."
            )


def notes(model: keras.Model, added: Sequence[Added]) -> list[str]:
    """Sentences on what of the training's loss is left out, and on what counts otherwise."""
    said = []
    left_out = [one.name for one in added if one.kind == "weights"]
    left_out += [
        f"the regulariser of weight {variable.path!r}"
        for variable in model.trainable_variables
        if variable.regularizer is not None
    ]
    if left_out:
        names = ", ".join(dict.fromkeys(left_out))
        said.append(
            "weight decay and weight regularisers belong to no example and are left out of the "
            f"loss: {names}."
        )
    for name in ("compute_loss", "train_step"):
        if getattr(type(model), name) is not getattr(keras.Model, name):
            said.append(
                f"the model has its own {name}. What is explained is Task.loss and what layers add "
                "to it; write the loss that was trained as Task.loss."
            )
    sums = dict.fromkeys(one.name for one in added if one.kind == "sum")
    if sums:
        said.append(
            f"what is added to the loss by {', '.join(sums)} is a sum over the batch. It counts as "
            "for a batch of one: in training, beside a loss that is a mean over the batch, it "
            "counted the batch size times as much."
        )
    return said
