"""An optimizer's second moments v: kept beside a checkpoint, and what they make of a gradient.

Adam, and what is like it, divides gradients number by number before it takes a step:

| optimizer | takes the gradient, or its mean, times |
|---|---|
| Adam, AdamW | √(1 − β₂ᵗ) / (√v + ε), with v the largest so far for amsgrad |
| Nadam | 1 / (√(v / (1 − β₂ᵗ)) + ε) |
| Adamax | 1 / (√v + ε), √v being its exponentially weighted maximum |
| RMSprop | 1 / √(v + ε), with v less the squared mean where it is centered |

t is the number of steps taken, and 1 − β₂ᵗ the correction for the start of v at zero.
"""

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from tracin_beam.errors import InputError
from tracin_beam.inputs import weights
from tracin_beam.inputs.checkpoints import moments_of

# By the classes of Keras, also of an optimizer that is derived from one of them.
_KEPT: dict[str, Callable[[Any], list[Any]]] = {
    "Adam": lambda adam: adam._velocity_hats if adam.amsgrad else adam._velocities,
    "Nadam": lambda nadam: nadam._velocities,
    "Adamax": lambda adamax: [np.square(weights.array(u)) for u in adamax._u],
    "RMSprop": lambda rms: (
        [
            np.maximum(weights.array(v) - np.square(weights.array(mean)), 0)
            for v, mean in zip(rms._velocities, rms._average_gradients, strict=True)
        ]
        if rms.centered
        else rms._velocities
    ),
}
# In a file, of a weight that the optimizer does not train.
_UNTRAINED = -1.0


def check(optimizer: Any) -> str:
    """Which of the optimizers above it is.

    Raises:
      InputError: none of them.
    """
    inner = _inner(optimizer)
    for cls in type(inner).__mro__:
        if cls.__name__ in _KEPT and cls.__module__.startswith("keras."):
            return cls.__name__
    raise InputError(
        f"the optimizer is {type(inner).__name__}, whose second moments cannot be kept: that is "
        "for Adam, AdamW, Nadam, Adamax and RMSprop. Leave the optimizer's state out, and compute "
        "with --gradient=plain"
    )


def _inner(optimizer: Any) -> Any:
    return getattr(optimizer, "inner_optimizer", optimizer)  # of a LossScaleOptimizer


def save(model: keras.Model, optimizer: Any, path: str) -> None:
    """Saves the second moments of every trained weight beside the weights at a path.

    Raises:
      InputError: the optimizer keeps none, or has taken no step.
    """
    kind, inner = check(optimizer), _inner(optimizer)
    steps = int(weights.array(inner.iterations))
    if not inner.built or not steps:
        raise InputError(
            f"the optimizer, {type(inner).__name__}, has taken no step, so that it has no second "
            "moments: give the one that trains, and save after its first step"
        )
    kept = dict(zip(map(id, inner._trainable_variables), _KEPT[kind](inner), strict=True))
    every = {id(v) for layer in model._flatten_layers() for v in layer._trainable_variables}

    def of_variable(variable: keras.Variable) -> np.ndarray | None:
        if id(variable) in kept:
            return weights.array(kept[id(variable)])
        untrained = np.full(tuple(variable.shape), _UNTRAINED, np.float32)
        return untrained if id(variable) in every else None

    notes = {
        "optimizer": kind,
        "epsilon": float(inner.epsilon),
        "correction": 1 - float(inner.beta_2) ** steps if kind in ("Adam", "Nadam") else 1.0,
        "weights": weights.digest(model),
    }
    weights.save_like(path, model, moments_of(path), of_variable, notes)


def scale(v: np.ndarray, notes: Mapping[str, Any]) -> np.ndarray | None:
    """What the optimizer multiplies a gradient by.

    A number that no step has moved, whose v is zero, counts for nothing.

    Args:
      v: float [...], as `save` has kept them.
      notes: as `save` has left them in the file.

    Returns:
      float64 [...]; or None, if the weight was not trained.
    """
    v = np.asarray(v, np.float64)
    if (v < 0).any():
        return None
    epsilon, correction = float(notes["epsilon"]), float(notes["correction"])
    moved = v > 0
    root = np.sqrt(np.where(moved, v, 1.0))
    match notes["optimizer"]:
        case "Adam" | "Adamax":
            found = np.sqrt(correction) / (root + epsilon)
        case "Nadam":
            found = 1 / (root / np.sqrt(correction) + epsilon)
        case _:
            found = 1 / np.sqrt(np.square(root) + epsilon)
    return np.where(moved, found, 0.0)
