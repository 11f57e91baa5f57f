"""Whether what the model and the loss give for an example is that example's alone.

TracIn takes the gradient of a loss ℓ(w, z) of one example z. There is none where the model is
random in inference mode, or where what it gives for an example, or its loss, depends on the others
of the batch: contrastive and in-batch losses, batch statistics taken in inference, a softmax over
the batch axis. Such models and losses are told by what they do: the same example is given several
times, alone and among others, and the first layer whose equal inputs give unequal outputs is named.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tracin_beam.errors import InputError
from tracin_beam.gradients import losses, nests

# Different examples that are looked at together.
COUNT = 8
# Times that one example is given in two runs, to find a model random. A block that leaves out one
# example in twenty goes unseen at a checkpoint with a chance of 0.95⁶⁴, 4 %.
_REPEATS = 32
# Differences between equal computations on batches of different sizes, relative to the outputs.
_ROUNDING = {"bfloat16": 0.1, "float16": 0.02}


@dataclasses.dataclass(frozen=True)
class _Call:
    operation: Any
    inputs: list[Any]
    outputs: list[Any]


def check_model(model: keras.Model, features: Any) -> Any:
    """Checks that the outputs for an example depend on nothing but the example and the weights.

    Args:
      model: with the weights of a checkpoint.
      features: of some examples, as different as can be; the first `COUNT` are taken.

    Returns:
      The model's output for these.

    Raises:
      InputError: the model is random in inference mode, or mixes the examples of a batch.
    """
    size = min(_size(features), COUNT)
    rounding = max(_ROUNDING.get(x.compute_dtype, 1e-5) for x in model._flatten_layers())
    equal, several = _take(features, [0] * _REPEATS), _take(features, range(size))

    def same(one: Any, other: Any) -> bool:
        return _same(one, other, rounding)

    first, second = (_run(model, equal) for _ in range(2))
    if not same(first, second):
        said = _first_difference(_recorded(model, equal), _recorded(model, equal), same)
        raise InputError(
            f"the model is random in inference mode: {said} gives other values each time, also "
            "with training=False. A gradient would be that of one arbitrary draw. " + _ADVICE
        )
    if not same(first, _rolled(first)):
        calls = _recorded(model, equal)
        rolled = [dataclasses.replace(c, outputs=_rolled(c.outputs)) for c in calls]
        said = _first_difference(calls, rolled, same)
        raise InputError(
            f"the model gives an example other values at another place of its batch: {said} is "
            "random, with a fixed seed, or mixes the examples of a batch. " + _ADVICE
        )
    together = _run(model, several)
    for i in sorted({0, size - 1}):
        one = _take(features, [i])

        def alike(one: Any, other: Any, row: int = i) -> bool:
            return _rows_same(one, other, row, size, rounding)

        if alike(_run(model, one), together):
            continue
        said = _first_difference(_recorded(model, one), _recorded(model, several), alike)
        raise InputError(
            f"the model mixes the examples of a batch in inference mode: what {said} gives for an "
            "example depends on the others of its batch, so that no example has a gradient of "
            "its own. Is it called with training=True, or does it reduce or normalise over the "
            "batch axis?"
        )
    return together


_ADVICE = (
    "Let the task build the model so that it is not random when training is false; layers without "
    "weights may be left out of it."
)


def _rolled(structure: Any) -> Any:
    """Every value that has a row for each of `_REPEATS` examples, with the rows of others."""

    def roll(x: Any) -> Any:
        return tf.roll(x, 1, axis=0) if x.shape[:1] == [_REPEATS] and x.dtype != tf.string else x

    return tf.nest.map_structure(roll, structure)


def check_parse(together: Any, alone: Sequence[Any]) -> None:
    """Checks that what parse gives for a record is that record's alone, but for padding.

    Args:
      together: features, label and sample_weight of some records that were parsed together.
      alone: the same, of each record parsed by itself.

    Raises:
      InputError: parse is random, or mixes the records of a batch.
    """
    every = [np.asarray(x) for x in nests.present(together)]
    for row, one in enumerate(alone):
        for whole, own in zip(every, nests.present(one), strict=True):
            part = np.asarray(own)
            among = whole[row : row + 1][tuple(slice(0, n) for n in part.shape)]
            if not _close(among, part, 1e-4):
                raise InputError(
                    "parse gives other values for a record among others than alone: it is random, "
                    "as augmentation is, or mixes the records of a batch. Each example must be "
                    "one and the same whenever it is read."
                )


def check_loss(loss: Any, label: Any, output: Any) -> None:
    """Checks that the loss of a batch is made of losses of its examples.

    The loss of an example alone must be its loss in the batch, wherever the loss says what that is.
    Where it gives one number for the batch, its gradient for an example must point where that of
    the example alone does, must stay when the output for another example changes, and stay but
    for a factor that all share, as of a mean over what counts, when the label of another changes.

    Args:
      loss: as in `Task.loss`.
      label: of n ≥ 1 examples.
      output: the model's for them.

    Raises:
      InputError: the loss mixes the examples of a batch, or is random.
    """
    size = _size(output)
    output = tf.nest.map_structure(_float, output)
    compute = losses.per_example_loss(loss)
    whole = losses.whole_batch_loss(loss)
    name = losses.describe(loss)
    values, again = (compute(label, output, None).numpy() for _ in range(2))
    if not _close(values, again, 1e-5):
        raise InputError(f"the loss is random: {name} gives other values each time.")
    alone = np.empty_like(values)
    gradient_alone = []
    for i in range(size):
        given = _take(label, [i])
        value, gradient = _gradient(
            lambda p, given=given: compute(given, p, None),  # type: ignore[misc]
            _take(output, [i]),
        )
        alone[i] = value
        gradient_alone.append(gradient[0])
    finite = np.isfinite(values) & np.isfinite(alone)
    if not _close(values[finite], alone[finite], 1e-3):
        worst = int(np.argmax(np.where(finite, np.abs(values - alone), 0)))
        raise _mixing(
            f"{name}: the loss of an example is {alone[worst]:.4g} alone and {values[worst]:.4g} "
            f"in a batch of {size}.{_broadcast(label, output)}"
        )
    if size < 2:
        return
    try:
        _, together = _gradient(lambda p: whole(label, p), output)
        _, changed = _gradient(lambda p: whole(label, p), _first_changed(output))
        relabelled = _first_relabelled(label)
        _, others = _gradient(lambda p: whole(relabelled, p), output)
    except Exception:  # it takes one example at a time only, as it is called here
        return
    sizes = np.linalg.norm(together, axis=1)
    scale = np.max(sizes, where=np.isfinite(sizes), initial=0)
    if not np.isfinite(together).all() or not np.isfinite(others).all():
        others = together
    factor = np.sum(others[1:] * together[1:]) / (np.sum(together[1:] ** 2) or 1.0)
    if np.linalg.norm(others[1:] - factor * together[1:], axis=1).max() > 2e-5 * scale:
        raise _mixing(
            f"{name}: the gradient for an example changes with the label of another one."
            + _broadcast(label, output)
        )
    for i in range(size):
        one, many = gradient_alone[i], together[i]
        if i and np.linalg.norm(changed[i] - many) > 1e-3 * scale:  # False where not finite
            raise _mixing(
                f"{name}: the gradient for an example changes with the output for another one."
            )
        lengths = np.linalg.norm(one), np.linalg.norm(many)
        turned = one @ many < 0.99 * lengths[0] * lengths[1]
        vanishes = min(lengths) <= 1e-6 * scale < 1e-3 * scale < max(lengths)
        if vanishes or (turned and lengths[1] > 1e-3 * scale):
            raise _mixing(
                f"{name}: the gradient for an example alone is another one than in a batch."
            )


def _mixing(what: str) -> InputError:
    return InputError(
        f"the loss mixes the examples of a batch, as contrastive and in-batch losses do: {what} "
        "TracIn needs a loss that each example has by itself."
    )


def _broadcast(label: Any, output: Any) -> str:
    pairs = zip(tf.nest.flatten(label), tf.nest.flatten(output), strict=False)
    for y, p in pairs:
        if y is not None and y.shape.rank != p.shape.rank and tf.size(y) == tf.size(p):
            return (
                f" Labels of shape {tuple(y.shape)} and outputs of shape {tuple(p.shape)} may be "
                "broadcast against each other: bring them to one shape."
            )
    return ""


def _first_relabelled(label: Any) -> Any:
    """The labels with another one for the first example, if there are others."""
    leaves = [np.asarray(x) for x in nests.present(label)]
    size = len(leaves[0])
    different = (i for i in range(size) if any(not np.array_equal(x[i], x[0]) for x in leaves))
    return _take(label, [next(different, 0), *range(1, size)])


def _first_changed(output: Any) -> Any:
    """The output with other values for its first example, between 0 and 1 if they were."""

    def change(x: tf.Tensor) -> tf.Tensor:
        first = x[:1]
        shift = tf.reshape(tf.linspace(0.05, 0.2, tf.size(first)), tf.shape(first))
        return tf.concat([0.75 * first + tf.cast(shift, x.dtype), x[1:]], axis=0)

    return tf.nest.map_structure(change, output)


def _gradient(function: Callable[[Any], tf.Tensor], output: Any) -> tuple[float, np.ndarray]:
    """The summed value, and its gradient for each example, float64 [n, numbers]."""
    with tf.GradientTape() as tape:
        tape.watch(output)
        value = tf.reduce_sum(function(output))
    gradients = tape.gradient(value, tf.nest.flatten(output), unconnected_gradients="zero")
    arrays = [np.asarray(tf.convert_to_tensor(g), np.float64) for g in gradients]
    return float(value), np.concatenate([x.reshape(len(x), -1) for x in arrays], axis=1)


def _float(x: tf.Tensor) -> tf.Tensor:
    # A tensor of its own loses what Keras keeps of how it was made, such as its logits.
    return tf.identity(tf.cast(x, tf.float32) if x.dtype.is_floating else x)


def _size(structure: Any) -> int:
    return int(tf.nest.flatten(structure)[0].shape[0])


def _take(structure: Any, indices: Sequence[int]) -> Any:
    return nests.map_present(lambda x: tf.gather(x, list(indices)), structure)


def _run(model: keras.Model, features: Any) -> Any:
    return model(features, training=False)


def _close(one: Any, other: Any, tolerance: float) -> bool:
    """Whether two arrays are the same up to rounding: relative to their size and spread."""
    one, other = np.asarray(one), np.asarray(other)
    if one.shape != other.shape:
        return False
    if one.dtype.kind not in "fV":
        return bool(np.array_equal(one, other))
    one, other = one.astype(np.float64), other.astype(np.float64)
    finite = np.isfinite(one) & np.isfinite(other)
    if not np.array_equal(one[~finite], other[~finite], equal_nan=True):
        return False
    if not finite.any():
        return True
    allowed = tolerance * np.abs(one[finite]).max()
    return bool(np.abs(one[finite] - other[finite]).max() <= allowed + 1e-30)


def _arrays(structure: Any) -> list[np.ndarray]:
    return [np.asarray(x) for x in tf.nest.flatten(structure)]


def _same(one: Any, other: Any, tolerance: float) -> bool:
    pairs = zip(_arrays(one), _arrays(other), strict=True)
    return all(_close(a, b, tolerance) for a, b in pairs)


def _rows_same(one: Any, together: Any, row: int, size: int, tolerance: float) -> bool:
    """Whether an example's values are those that it has as a row among others."""
    return all(
        _row_close(a, b, row, size, tolerance)
        for a, b in zip(_arrays(one), _arrays(together), strict=True)
    )


def _row_close(
    one: np.ndarray, together: np.ndarray, row: int, size: int, tolerance: float
) -> bool:
    if together.ndim and together.shape[0] == size and one.shape == (1, *together.shape[1:]):
        if not _close(one[0], together[row], tolerance):
            # Rounding of large numbers makes differences far below those between examples.
            spread = np.ptp(together.astype(np.float64), axis=0) if one.dtype.kind in "fV" else 0
            return bool(
                one.dtype.kind in "fV"
                and np.all(np.abs(one[0] - together[row]) <= 1e-3 * np.max(spread))
            )
        return True
    return _close(one, together, tolerance)


def _first_difference(
    one: Sequence[_Call], other: Sequence[_Call], same: Callable[[Any, Any], bool]
) -> str:
    """The first layer or operation that is given the same in two runs and gives what is not."""
    for a, b in zip(one, other, strict=False):
        if a.operation is not b.operation:
            break
        if len(a.inputs) != len(b.inputs) or not same(a.inputs, b.inputs):
            continue
        if len(a.outputs) == len(b.outputs) and not same(a.outputs, b.outputs):
            if isinstance(a.operation, keras.Model):
                break
            kind = "layer" if isinstance(a.operation, keras.Layer) else "operation"
            return f"{kind} {a.operation.name!r} ({type(a.operation).__name__})"
    return "code outside of its layers"


def _recorded(model: keras.Model, features: Any) -> list[_Call]:
    """The calls of layers and operations in a run of the model, inner ones first."""
    calls: list[_Call] = []
    with _recording(model, calls):
        _run(model, features)
    return calls


@contextlib.contextmanager
def _recording(model: keras.Model, calls: list[_Call]) -> Iterator[None]:
    operations = {id(x): x for x in model._flatten_layers()}
    for layer in list(operations.values()):
        operations.update({id(x): x for x in getattr(layer, "operations", [])})
    replaced = []

    def recorded(operation: Any, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            outputs = call(*args, **kwargs)
            tensors = [
                [x for x in tf.nest.flatten(part) if tf.is_tensor(x)]
                for part in ((args, kwargs), outputs)
            ]
            calls.append(_Call(operation, *tensors))
            return outputs

        return wrapper

    try:
        for operation in operations.values():
            object.__setattr__(operation, "call", recorded(operation, operation.call))
            replaced.append(operation)
        yield
    finally:
        for operation in replaced:
            object.__delattr__(operation, "call")
