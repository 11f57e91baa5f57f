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
from tracin_beam.gradients import nests

# Operations whose results depend on a tensor's shape alone.
_SHAPES = {"Shape", "ShapeN", "Size", "Rank"}


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
    reached = {id(x.op) for x in graph.inputs[: len(flat)]}
    for operation in graph.get_operations():  # in the order in which they were made
        if operation.type not in _SHAPES and any(id(x.op) in reached for x in operation.inputs):
            reached.add(id(operation))
    return [id(loss.op) in reached for loss in losses]


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


def values(model: keras.Model, added: Sequence[Added], features: Any) -> tf.Tensor:
    """float32 [n]: what the model adds to each example's loss, each run by itself."""

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
