"""The score of a training example z for a query z', written once.

Every score here is a weighted sum over checkpoints c of inner products of gradients, in which only
the query's side may be transformed:

    score(z, z') = Σ_c weight_c ⟨g_c(z), T_c g_c(z')⟩

What retrieves takes g_c = S ∇ℓ(w_c, ·), the embeddings; what scores exactly takes g_c = ∇ℓ(w_c, ·).
As T_c stands on the query alone, the embeddings of the training set serve every method.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from tracin_beam.scoring.curvature import Curvature

if TYPE_CHECKING:
    from tracin_beam.gradients.engine import Queries

_METHODS: dict[str, "type[Score]"] = {}

T = TypeVar("T", bound="type[Score]")


def method(name: str) -> Callable[[T], T]:
    """Registers a `Score` under the name that run.json shows."""

    def register(cls: T) -> T:
        cls.name = name
        _METHODS[name] = cls
        return cls

    return register


def names() -> list[str]:
    """The registered methods."""
    return sorted(_METHODS)


def make(
    name: str,
    learning_rates: Sequence[float],
    curvature: Callable[[int], Curvature] | None = None,
) -> "Score":
    """A method's score, for checkpoints with these learning rates.

    Args:
      name: of the method.
      learning_rates: in checkpoint order.
      curvature: what a preconditioned score needs to know of the checkpoint of a place.
    """
    return _METHODS[name](learning_rates, curvature)


def of_preconditioner(preconditioner: str) -> str:
    """The method that --preconditioner stands for."""
    return next(name for name in names() if _METHODS[name].preconditioner == preconditioner)


def preconditioners() -> tuple[str, ...]:
    """The values of --preconditioner."""
    return tuple(dict.fromkeys(method.preconditioner for method in _METHODS.values()))


class Score:
    """A score; a method says what the weights are and how a query is transformed.

    Attributes:
      name: of the method.
      preconditioner: the value of the flag that stands for it.
      on_embeddings: whether the score is defined on embeddings, so that their inner product is
        exact and gradients are never asked for.
      written_out: whether queries' gradients must be written out to be transformed.
      more: times as many candidates are scored exactly as --rescore says.
      weights: float64 [C], in checkpoint order.
    """

    name: str
    preconditioner = "none"
    on_embeddings = False
    written_out = False
    more = 1

    def __init__(
        self,
        learning_rates: Sequence[float],
        curvature: Callable[[int], Curvature] | None = None,
    ) -> None:
        self._curvature = curvature
        self.weights = self.weigh(np.asarray(learning_rates, np.float64))

    def weigh(self, learning_rates: np.ndarray) -> np.ndarray:
        """The checkpoints' weights: float64 [C], none below zero."""
        raise NotImplementedError

    def of_embeddings(self, checkpoint: int, embedding: np.ndarray) -> np.ndarray:
        """T_c of queries' embeddings at the checkpoint of this place: float32 [q, D]."""
        return embedding

    def of_root(self, checkpoint: int, embedding: np.ndarray) -> np.ndarray:
        """T_c^½ of embeddings, whose inner products are estimated terms: float [n, D]."""
        return embedding

    def of_gradients(self, checkpoint: int, gradients: "Queries") -> "Queries":
        """T_c of queries' gradients, for the exact score."""
        return gradients

    def squares(self, checkpoint: int, embedding: np.ndarray) -> np.ndarray:
        """⟨s, T_c s⟩ of embeddings [n, D], where the score is defined on them: float64 [n]."""
        raise NotImplementedError

    def parts(self, checkpoint: int) -> dict[str, dict[str, np.ndarray]]:
        """T_c of gradients, where they are written out; see `Curvature.parts`."""
        raise NotImplementedError

    def by_checkpoint(self, products: np.ndarray) -> np.ndarray:
        """The score's terms, from inner products with transformed queries.

        Args:
          products: float [..., C].

        Returns:
          float64 [..., C], whose sum over the last axis is the score.
        """
        return products.astype(np.float64) * self.weights

    @property
    def roots(self) -> np.ndarray:
        """√weight_c by checkpoint: float64 [C]; see `query_rows`."""
        return np.sqrt(self.weights)

    def queries(self, rows: np.ndarray) -> np.ndarray:
        """Queries to take products with, as `estimates` does: weight_c T_c e_c.

        Args:
          rows: the queries' embeddings, e_c for one checkpoint after the other: float [q, C·D].

        Returns:
          An array of the same shape and type.
        """
        return self._transformed(rows, self.weights)

    def estimates(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Estimated scores, by one matrix product.

        Args:
          queries: from `queries`.
          rows: the training examples' embeddings, e_c for one checkpoint after the other:
            float [n, C·D].

        Returns:
          float [q, n].
        """
        # NumPy is three times as slow with two types.
        return queries @ rows.astype(queries.dtype, copy=False).T

    def query_rows(self, rows: np.ndarray) -> np.ndarray:
        """√weight_c T_c e_c for one checkpoint after the other: of the shape and type of rows.

        The inner product with a training example's √weight_c e_c is the estimated score; both sides
        have a share of the weight, so that a further sketch errs least.
        """
        return self._transformed(rows, self.roots)

    def _transformed(self, rows: np.ndarray, scales: np.ndarray) -> np.ndarray:
        parts = np.split(rows, len(scales), axis=1)
        scaled = [
            (scale * self.of_embeddings(c, part)).astype(rows.dtype)
            for c, (scale, part) in enumerate(zip(scales, parts, strict=True))
        ]
        return np.concatenate(scaled, axis=1)


@method("TracInCP")
class TracInCP(Score):
    """Σ_c η_c ∇ℓ(w_c, z) · ∇ℓ(w_c, z'), η_c the learning rate at checkpoint c.

    Pruthi, Liu, Kale and Sundararajan: Estimating Training Data Influence by Tracing Gradient
    Descent, NeurIPS 2020, section 3.3.
    """

    def weigh(self, learning_rates: np.ndarray) -> np.ndarray:
        return learning_rates


@method("TracInCP, preconditioned in the projection")
class Projected(TracInCP):
    """Σ_c η_c s_c(z)ᵀ (R_c + λ_c I)⁻¹ s_c(z'), s_c = S ∇ℓ(w_c, ·), R_c = (1/n) Σ_z s_c(z) s_c(z)ᵀ.

    λ_c = κ tr(R_c) / D. R_c is the projection of the empirical Fisher matrix, so that a term is
    that of an influence function (Koh and Liang 2017, equation 2) in the projection, up to a
    constant. The score is defined on embeddings: their products are its exact values.
    """

    preconditioner = "projected"
    on_embeddings = True

    def of_embeddings(self, checkpoint: int, embedding: np.ndarray) -> np.ndarray:
        return self._of(checkpoint).solve(embedding)

    def of_root(self, checkpoint: int, embedding: np.ndarray) -> np.ndarray:
        return self._of(checkpoint).root(embedding)

    def squares(self, checkpoint: int, embedding: np.ndarray) -> np.ndarray:
        return self._of(checkpoint).squares(embedding)

    def _of(self, checkpoint: int) -> Curvature:
        if self._curvature is None:
            raise ValueError(f"{self.name} needs the curvature")
        return self._curvature(checkpoint)


@method("TracInCP, preconditioned by K-FAC")
class KFac(Projected):
    """Σ_c η_c ∇ℓ(w_c, z) · (A_c ⊗ B_c + λ_c I)⁻¹ ∇ℓ(w_c, z') by weight, of whole gradients.

    Martens and Grosse: Optimizing Neural Networks with Kronecker-factored Approximate Curvature,
    2015; Grosse et al.: Studying Large Language Model Generalization with Influence Functions,
    2023. Candidates come from `Projected`'s rows; see `curvature.Kronecker` for the factors.
    """

    preconditioner = "kfac"
    on_embeddings = False
    written_out = True
    more = 10

    def of_gradients(self, checkpoint: int, gradients: "Queries") -> "Queries":
        transformed = self._of(checkpoint).precondition(gradients.gradients)
        return dataclasses.replace(gradients, gradients=transformed)

    def parts(self, checkpoint: int) -> dict[str, dict[str, np.ndarray]]:
        return self._of(checkpoint).parts()


# What a run takes where it says nothing.
DEFAULT = TracInCP.name
