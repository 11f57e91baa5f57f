"""What preconditioners know of a checkpoint: second moments of the training examples' gradients.

A training example's second moments are taken as sums, which add up over groups of shards, so that a
group that is new or changed costs itself alone. What is kept of sums is by name in a flat
dictionary of float64 arrays, which `numpy.savez` writes:

    R, H               Σ s sᵀ over the embeddings, and over every second of them: [D, D]
    <i>/A, <i>/B       of the i-th weight, Σ ã ãᵀ and Σ δ δᵀ: [m, m] and [n, n]; only their
                       diagonals, [m] or [n], where the side is wider than WIDEST
    <i>+<j>/A, …/B     the same of the i-th and its bias, the j-th, whose input is ã's last, a one:
                       [m + 1, m + 1]
    <i>/diagonal       of a weight without factors, Σ g²: [N]
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Of the sums on disk; to be raised when their meaning changes.
LAYOUT = 2
# The widest side of a weight whose factor is a matrix: 128 MB, and 20 s for its eigenvectors.
WIDEST = 4096
# The longest embedding that has a matrix of second moments, of 512 MB.
LONGEST = 8192

# Singular values that are left out, against the greatest, and directions they are sought among.
_NEGLIGIBLE, _SKETCHED = 1e-7, 64

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
    """Σ s sᵀ of float32 [n, D]: float64 [D, D].

    Sums of some thousand rows are as good in float32, and cost a quarter: the product of a matrix
    with itself is symmetric, which BLAS knows.
    """
    return (rows.T @ rows).astype(np.float64)


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
        self._root: np.ndarray | None = None
        self._parts: dict[str, Kronecker | np.ndarray] = {}
        # A process's threads share it, and each inverse is to be taken once.
        self._lock = threading.Lock()

    def solve(self, rows: np.ndarray) -> np.ndarray:
        """(R + κ tr(R)/D I)⁻¹ s of float [n, D]: float64 [n, D]."""
        with self._lock:
            if self._inverse is None:
                self._inverse = inverse(self._means["R"], self._damping)
        return rows.astype(np.float64) @ self._inverse

    def root(self, rows: np.ndarray) -> np.ndarray:
        """Qᵀ s of float [n, D], Q Qᵀ being (R + κ tr(R)/D I)⁻¹: float64 [n, D].

        Their inner products are those of s with what `solve` makes of another s.
        """
        if self._root is None:
            values, vectors = np.linalg.eigh(inverse(self._means["R"], self._damping))
            self._root = vectors * np.sqrt(np.maximum(values, 0))
        return rows.astype(np.float64) @ self._root

    def precondition(self, gradients: Sequence[Any]) -> list[Any]:
        """K-FAC's inverse times gradients, weight by weight.

        Args:
          gradients: of every weight, in their order: float [n, N], or a `forms.Outer` of arrays
            where they are outer products.

        Returns:
          The same, in float32; outer products have become sums of some.
        """
        found = [
            g._replace(left=np.zeros_like(g.left), right=np.zeros_like(g.right))
            if hasattr(g, "left")
            else np.zeros(g.shape, np.float32)
            for g in gradients
        ]
        for part in self._names():
            numbers = [int(number) for number in part.split("+")]
            first: Any = gradients[numbers[0]]
            inverted = self._of_part(part)
            if hasattr(first, "left") and isinstance(inverted, Kronecker):
                a, g = (x[:, 0].astype(np.float64) for x in first)
                m = a.shape[1]
                # A bias is the last row of its kernel, for an input of one.
                a = np.pad(a, [(0, 0), (0, len(numbers) - 1)], constant_values=1.0)
                left, right = inverted.of_outer(a, g)
                found[numbers[0]] = first._replace(left=left[..., :m], right=right)
                for bias in numbers[1:]:
                    found[bias] = np.einsum("qr,qrn->qn", left[..., m], right)
                continue
            beside = np.concatenate([gradients[i] for i in numbers], axis=1, dtype=np.float64)
            beside = inverted(beside) if isinstance(inverted, Kronecker) else beside * inverted
            sizes = [gradients[i].shape[1] for i in numbers]
            for i, own in zip(numbers, np.split(beside, np.cumsum(sizes)[:-1], 1), strict=True):
                found[i] = own.astype(np.float32)
        return found

    def squares(self, rows: np.ndarray) -> np.ndarray:
        """sᵀ (R + κ tr(R)/D I)⁻¹ s of float [n, D]: float64 [n]."""
        return np.einsum("nd,nd->n", rows.astype(np.float64), self.solve(rows))

    def parts(self) -> dict[str, dict[str, np.ndarray]]:
        """K-FAC's inverse by part, Q diag(by) Qᵀ, as `Engine.quadratic` takes it.

        Returns:
          "by" float64 [m, n] with "left" [m, m] and "right" [n, n], unless they are identities; or
          "by" [N].
        """
        found = {}
        for part in self._names():
            one = self._of_part(part)
            found[part] = one.arrays() if isinstance(one, Kronecker) else {"by": one}
        return found

    def _names(self) -> list[str]:
        return sorted({name.partition("/")[0] for name in self._means} - {"R", "H"})

    def _of_part(self, part: str) -> "Kronecker | np.ndarray":
        with self._lock:
            if part not in self._parts:
                self._parts[part] = self._inverted(part)
            return self._parts[part]

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
        self._terms: tuple[np.ndarray, np.ndarray] | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """The inverse eigenvalues "by", [m, n], and the eigenvectors, "left" and "right"."""
        sides = {"left": self._left, "right": self._right}
        return {"by": self._by} | {name: x for name, x in sides.items() if x is not None}

    def __call__(self, gradients: np.ndarray) -> np.ndarray:
        """The preconditioned float64 [q, m·n]."""
        x = gradients.reshape(-1, len(self._a), len(self._b))
        x = x if self._left is None else np.matmul(self._left.T, x)
        x = x if self._right is None else x @ self._right
        x = x * self._by
        x = x if self._left is None else np.matmul(self._left, x)
        x = x if self._right is None else x @ self._right.T
        return x.reshape(gradients.shape)

    def of_outer(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The preconditioned outer products left ⊗ right, as sums of few of them.

        1 / (λ_A λ_B + λ) is a smooth function of the two logarithms, and so a sum of some ten
        products of functions of one of them each: a query takes r (m + n) numbers, not m n.

        Args:
          left, right: float64 [q, m] and [q, n].

        Returns:
          float32 [q, r, m] and [q, r, n].
        """
        if self._terms is None:
            self._terms = _terms(self._by, self._a, self._b)
        found = []
        for x, vectors, terms in zip(
            (left, right), (self._left, self._right), self._terms, strict=True
        ):
            turned = x if vectors is None else x @ vectors
            scaled = turned[:, None] * terms
            scaled = scaled if vectors is None else scaled @ vectors.T
            found.append(scaled.astype(np.float32))
        return found[0], found[1]


def _terms(by: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[r, m] and [r, n] with Σ_r u_r ⊗ v_r = by, as far as scores are concerned.

    The entries count as gradients have them, the root of λ_A or λ_B each. A random sketch of the
    columns finds the leading singular vectors (Halko, Martinsson and Tropp 2011).
    """
    floor = 1 / by.max() if by.any() else 1.0
    rows, columns = (np.sqrt(x * y.max() + floor) for x, y in ((a, b), (b, a)))
    matrix = rows[:, None] * by * columns
    basis: np.ndarray = matrix
    if min(by.shape) > _SKETCHED:
        random = np.random.default_rng(0).normal(size=(by.shape[1], _SKETCHED))
        basis = np.linalg.qr(matrix @ random)[0]
        u, s, v = np.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ u
    else:
        u, s, v = np.linalg.svd(matrix, full_matrices=False)
    count = max(1, int(np.sum(s > _NEGLIGIBLE * s[0])))
    return (u[:, :count] * s[:count]).T / rows, v[:count] / columns


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
