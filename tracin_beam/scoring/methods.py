"""The score of a training example z for a query z', written once.

Every score here is a weighted sum over checkpoints c of inner products of gradients, in which only
the query's side may be transformed:

    score(z, z') = Σ_c weight_c ⟨g_c(z), T_c g_c(z')⟩

What retrieves takes g_c = S ∇ℓ(w_c, ·), the embeddings; what scores exactly takes g_c = ∇ℓ(w_c, ·).
As T_c stands on the query alone, the embeddings of the training set serve every method.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

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


def make(name: str, learning_rates: Sequence[float]) -> "Score":
    """A method's score, for checkpoints with these learning rates."""
    return _METHODS[name](learning_rates)


class Score:
    """A score; a method says what the weights are and how a query is transformed.

    Attributes:
      name: of the method.
      weights: float64 [C], in checkpoint order.
    """

    name: str

    def __init__(self, learning_rates: Sequence[float]) -> None:
        self.weights = self.weigh(np.asarray(learning_rates, np.float64))

    def weigh(self, learning_rates: np.ndarray) -> np.ndarray:
        """The checkpoints' weights: float64 [C], none below zero."""
        raise NotImplementedError

    def of_embeddings(self, checkpoint: int, embedding: np.ndarray) -> np.ndarray:
        """T_c of queries' embeddings at the checkpoint of this place: float32 [q, D]."""
        return embedding

    def of_gradients(self, checkpoint: int, gradients: "Queries") -> "Queries":
        """T_c of queries' gradients, for the exact score."""
        return gradients

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
        return queries @ rows.T

    def query_rows(self, rows: np.ndarray) -> np.ndarray:
        """√weight_c T_c e_c for one checkpoint after the other: of the shape and type of rows.

        The inner product with a training example's √weight_c e_c is the estimated score; both sides
        have a share of the weight, so that a further sketch errs least.
        """
        return self._transformed(rows, self.roots)

    def _transformed(self, rows: np.ndarray, scales: np.ndarray) -> np.ndarray:
        parts = np.split(rows, len(scales), axis=1)
        scaled = [
            rows.dtype.type(scale) * self.of_embeddings(c, part)
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


# What a run takes.
DEFAULT = TracInCP.name
