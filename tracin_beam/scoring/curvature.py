"""What preconditioners know of a checkpoint: second moments of the training examples' gradients.

A training example's second moments are taken as sums, which add up over groups of shards, so that a
group that is new or changed costs itself alone. What is kept of sums is by name in a flat
dictionary of float64 arrays, which `numpy.savez` writes:

    R                  Σ s sᵀ over the embeddings: [D, D]
    <i>/A, <i>/B       of the i-th weight, Σ ã ãᵀ and Σ δ δᵀ: [m, m] and [n, n]; only their
                       diagonals, [m] or [n], where the side is wider than WIDEST
    <i>+<j>/A, …/B     the same of the i-th and its bias, the j-th, whose input is ã's last, a one:
                       [m + 1, m + 1]
    <i>/diagonal       of a weight without factors, Σ g²: [N]
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Of the sums on disk; to be raised when their meaning changes.
LAYOUT = 2
# The widest side of a weight whose factor is a matrix: 128 MB, and 20 s for its eigenvectors.
WIDEST = 4096
# The longest embedding that has a matrix of second moments, of 512 MB.
LONGEST = 8192

Sums = Mapping[str, np.ndarray]


def added(one: Sums, other: Sums) -> dict[str, np.ndarray]:
    """The sums of two sets of examples together; either may be empty."""
    names = {*one, *other}
    return {
        name: one[name] + other[name]
        if name in one and name in other
        else (one[name] if name in one else other[name])
        for name in sorted(names)
    }


def scaled(sums: Sums, factor: float) -> dict[str, np.ndarray]:
    """The sums times a factor: what all examples would give, from a sample of them."""
    return {name: factor * value for name, value in sums.items()}


def of_embeddings(rows: np.ndarray) -> np.ndarray:
    """Σ s sᵀ of float [n, D]: float64 [D, D]."""
    wide = rows.astype(np.float64)
    return wide.T @ wide


class Curvature:
    """Means of second moments at a checkpoint, damped and inverted where they are asked for.

    Args:
      means: as at the top of this module, divided by the number of examples.
      damping: κ; λ is κ times the mean eigenvalue of what is inverted.
    """

    def __init__(self, means: Sums, damping: float) -> None:
        self._means = means
        self._damping = damping
        self._inverse: np.ndarray | None = None
        self._parts: dict[str, Kronecker | np.ndarray] = {}

    def solve(self, rows: np.ndarray) -> np.ndarray:
        """(R + κ tr(R)/D I)⁻¹ s of float [n, D]: float64 [n, D]."""
        if self._inverse is None:
            self._inverse = inverse(self._means["R"], self._damping)
        return rows.astype(np.float64) @ self._inverse

    def precondition(self, gradients: Sequence[Any]) -> list[np.ndarray]:
        """K-FAC's inverse times gradients, weight by weight.

        Args:
          gradients: float [n, N] of every weight, in their order.

        Returns:
          float32 arrays of the same shapes.
        """
        found = [np.zeros(np.shape(g), np.float32) for g in gradients]
        for part in sorted({name.partition("/")[0] for name in self._means} - {"R"}):
            numbers = [int(number) for number in part.split("+")]
            # A bias is the last row of its kernel.
            beside = np.concatenate([gradients[i] for i in numbers], axis=1, dtype=np.float64)
            if part not in self._parts:
                self._parts[part] = self._inverted(part)
            inverted = self._parts[part]
            beside = inverted(beside) if isinstance(inverted, Kronecker) else beside * inverted
            sizes = [np.shape(gradients[i])[1] for i in numbers]
            for i, own in zip(numbers, np.split(beside, np.cumsum(sizes)[:-1], 1), strict=True):
                found[i] = own.astype(np.float32)
        return found

    def _inverted(self, part: str) -> "Kronecker | np.ndarray":
        if f"{part}/A" in self._means:
            return Kronecker(self._means[f"{part}/A"], self._means[f"{part}/B"], self._damping)
        diagonal = self._means[f"{part}/diagonal"]
        return _reciprocal(diagonal + self._damping * diagonal.mean())


class Kronecker:
    """q ↦ Q_A [(Q_Aᵀ q Q_B) ⊘ (λ_A λ_Bᵀ + κ mean)] Q_Bᵀ = (A ⊗ B + λ I)⁻¹ q.

    With A = Q_A diag(λ_A) Q_Aᵀ, and λ = κ mean(λ_A λ_Bᵀ): George et al. 2018 for the eigenbases,
    Grosse et al. 2023, section 3.1, for influence. A side of which only the diagonal is known is
    its own eigenbasis.

    Args:
      a, b: float64 [m, m] or [m], and [n, n] or [n].
      damping: κ.
    """

    def __init__(self, a: np.ndarray, b: np.ndarray, damping: float) -> None:
        self._a, self._left = _eigen(a)
        self._b, self._right = _eigen(b)
        values = np.outer(self._a, self._b)
        self._by = _reciprocal(values + damping * values.mean())

    def __call__(self, gradients: np.ndarray) -> np.ndarray:
        """The preconditioned float64 [q, m·n]."""
        x = gradients.reshape(-1, len(self._a), len(self._b))
        x = x if self._left is None else np.matmul(self._left.T, x)
        x = x if self._right is None else x @ self._right
        x = x * self._by
        x = x if self._left is None else np.matmul(self._left, x)
        x = x if self._right is None else x @ self._right.T
        return x.reshape(gradients.shape)


def inverse(moments: np.ndarray, damping: float) -> np.ndarray:
    """(R + κ tr(R)/D I)⁻¹ of a symmetric float64 [D, D]; zero where R is."""
    size = len(moments)
    ridge = damping * np.trace(moments) / size
    if ridge == 0:
        return np.zeros_like(moments)
    return np.linalg.inv(moments + ridge * np.eye(size))


def _eigen(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    if moments.ndim == 1:
        return moments, None
    values, vectors = np.linalg.eigh(moments)
    return np.maximum(values, 0), vectors


def _reciprocal(values: np.ndarray) -> np.ndarray:
    return np.divide(1.0, values, out=np.zeros_like(values), where=values > 0)
