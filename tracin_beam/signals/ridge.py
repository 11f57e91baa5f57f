"""What the rest of the training set says of an example's label: a ridge, itself left out.

Labels y, as one-hot rows or numbers, are regressed on label-free features φ of the examples, with a
constant that is not shrunk:

    minimise  Σ_i |y_i − b − Wᵀφ_i|² + λ|W|²

All that is needed of the training set is a sum over its examples (`Sums`), so that shards are
added, and one that is gone is subtracted. With an example's own leverage h, its output from all
*other* examples is (ŷ − h y) / (1 − h), in closed form (Allen 1974, PRESS; Golub, Heath and Wahba
1979), so nothing is fitted twice. The same holds for any other label that it might have had, since
its own label does not enter.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

# λ over the mean eigenvalue of the features' scatter, and temperatures of the outputs' softmax.
LAMBDAS = tuple(10 ** (power / 2) for power in range(-6, 3))
TEMPERATURES = tuple(2 ** (power / 2) for power in range(-12, 5))

# A leverage of one would be an example that alone fixes its own output.
_LARGEST_LEVERAGE = 1 - 1e-9


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums over examples with features φ [D] and targets y [K].

    Attributes:
      count: of examples.
      phi: float64 [D], Σ φ.
      target: float64 [K], Σ y.
      phi_phi: float64 [D, D], Σ φφᵀ.
      phi_target: float64 [D, K], Σ φyᵀ.
    """

    count: int
    phi: np.ndarray
    target: np.ndarray
    phi_phi: np.ndarray
    phi_target: np.ndarray

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(a + b for a, b in zip(self._parts(), other._parts(), strict=True)))

    def __sub__(self, other: "Sums") -> "Sums":
        """Without the examples of the other, which are among these."""
        return Sums(*(a - b for a, b in zip(self._parts(), other._parts(), strict=True)))

    def _parts(self) -> tuple:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def sums(phi: np.ndarray, target: np.ndarray) -> Sums:
    """The sums of some examples.

    Args:
      phi: [n, D], finite.
      target: [n, K].
    """
    phi, target = phi.astype(np.float64), target.astype(np.float64)
    return Sums(len(phi), phi.sum(0), target.sum(0), phi.T @ phi, phi.T @ target)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A ridge regression for every λ of a list, by one eigendecomposition.

    Attributes:
      count: of training examples.
      mean: float64 [D], of the features.
      constant: float64 [K], mean of the targets.
      vectors: float64 [D, D], eigenvectors of the centred features' scatter, as columns.
      values: float64 [D], its eigenvalues.
      projected: float64 [D, K], the centred Σ φyᵀ in their basis.
      lambdas: the λ themselves, by those of `LAMBDAS`.
    """

    count: int
    mean: np.ndarray
    constant: np.ndarray
    vectors: np.ndarray
    values: np.ndarray
    projected: np.ndarray
    lambdas: tuple[float, ...]


def fit(whole: Sums, lambdas: Sequence[float] = LAMBDAS) -> Fitted:
    """Fits to the sums of the training set.

    Args:
      whole: of at least two examples.
      lambdas: over the mean eigenvalue.

    Raises:
      ValueError: there are fewer than two examples.
    """
    if whole.count < 2:
        raise ValueError(f"{whole.count} examples: at least two are needed to leave one out")
    mean, constant = whole.phi / whole.count, whole.target / whole.count
    scatter = whole.phi_phi - whole.count * np.outer(mean, mean)
    values, vectors = np.linalg.eigh((scatter + scatter.T) / 2)
    values = np.maximum(values, 0)
    projected = vectors.T @ (whole.phi_target - whole.count * np.outer(mean, constant))
    # Features that are all alike say nothing: any λ gives the constant.
    scale = values.mean() or 1.0
    return Fitted(
        whole.count,
        mean,
        constant,
        vectors,
        values,
        projected,
        tuple(scale * ratio for ratio in lambdas),
    )


def leave_one_out(
    fitted: Fitted, choice: int, phi: np.ndarray, target: np.ndarray | None
) -> np.ndarray:
    """What the regression on all other examples gives for each example: float64 [n, K].

    Args:
      fitted: to the training set.
      choice: of λ, a place in `fitted.lambdas`.
      phi: [n, D], features of some examples.
      target: [n, K], their targets, if they were among those that it was fitted to; None for
        others, which have nothing to be left out.
    """
    rotated = (phi.astype(np.float64) - fitted.mean) @ fitted.vectors
    shrunk = rotated / (fitted.values + fitted.lambdas[choice])
    output = fitted.constant + shrunk @ fitted.projected
    if target is None:
        return output
    leverage = 1 / fitted.count + np.einsum("nd,nd->n", shrunk, rotated)
    leverage = np.minimum(leverage, _LARGEST_LEVERAGE)[:, None]
    return (output - leverage * target) / (1 - leverage)


def refitted(fitted: Fitted, target: np.ndarray, phi_target: np.ndarray) -> Fitted:
    """A fit of other targets of the same examples.

    Args:
      fitted: to them.
      target: [K], Σ y of the other targets.
      phi_target: [D, K], Σ φyᵀ.
    """
    constant = target / fitted.count
    centred = phi_target - fitted.count * np.outer(fitted.mean, constant)
    return dataclasses.replace(fitted, constant=constant, projected=fitted.vectors.T @ centred)


def errors(fitted: Fitted, phi: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Summed squared leave-one-out errors of some training examples, by λ: float64 [L].

    Those of parts of the training set add up; the λ of the least sum is chosen.
    """
    found = [leave_one_out(fitted, i, phi, target) for i in range(len(fitted.lambdas))]
    return np.array([np.square(output - target).sum() for output in found])


def tempered(
    output: np.ndarray, target: np.ndarray, separate: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """What some examples say of each temperature of `TEMPERATURES`.

    Those of parts of the training set add up; the temperature of the greatest likelihood is chosen.

    Args:
      output: [n, K], as `leave_one_out` gives it.
      target: [n, K] of zeros and ones.
      separate: whether each class is by itself, in a multi-label task.

    Returns:
      Summed log-likelihoods of the given labels, float64 [T], and the summed probability of the
      given class by class, float64 [T, K].
    """
    likelihoods, given = [], []
    for temperature in TEMPERATURES:
        q = np.maximum(probabilities(output, temperature, separate), 1e-12)
        other = np.maximum(1 - q, 1e-12) if separate else 1.0
        likelihoods.append(np.sum(target * np.log(q) + (1 - target) * np.log(other)))
        given.append(np.sum(target * q, axis=0))
    return np.array(likelihoods), np.array(given)


def probabilities(output: np.ndarray, temperature: float, separate: bool = False) -> np.ndarray:
    """Probabilities q [n, K] of classes from outputs of a regression on one-hot labels.

    A softmax of output / temperature; a logistic of (output − ½) / temperature where `separate`.
    """
    if separate:
        return 1 / (1 + np.exp(-np.clip((output - 0.5) / temperature, -500, 500)))
    return softmax(output / temperature)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of classes: float [n, K], rows that sum to 1."""
    grown = np.exp(logits - logits.max(axis=1, keepdims=True))
    return grown / grown.sum(axis=1, keepdims=True)
