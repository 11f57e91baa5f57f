"""How little damping a preconditioned score may have, by how the training set's halves agree.

With too little the inverse second moments amplify the noise in them: other training examples would
give other scores. With too much all queries have the same scores, those of the few directions that
all gradients share. So the least is taken with which second moments of two halves of the training
set give much the same scores for held-out examples.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tracin_beam.scoring.curvature import inverse

# Values of κ that are tried, each about three times the one before.
GRID = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
# Agreement of the halves that is enough, of correlations. On networks that are not those of the
# benchmark the datamodelling score was then within 0.01 of its best.
ENOUGH = 0.6
# Taken where there is nothing to choose by.
DEFAULT = 1.0


class Part(NamedTuple):
    """What is known of a checkpoint.

    Attributes:
      halves: mean second moments of two halves of the training set, float64 [D, D] each.
      queries: embeddings of held-out examples, float [q, D].
      rows: embeddings of training examples, float [n, D].
    """

    halves: tuple[np.ndarray, np.ndarray]
    queries: np.ndarray
    rows: np.ndarray


class Chosen(NamedTuple):
    """A damping, and how the halves agree with each that was tried.

    Attributes:
      damping: κ.
      agreement: by κ; empty where there was nothing to choose by.
    """

    damping: float
    agreement: dict[float, float]


def choose(parts: Sequence[Part]) -> Chosen:
    """The least κ of GRID with which the halves agree enough, or else the greatest.

    Agreement is the correlation, over training examples, of a query's scores
    sᵀ (R + κ tr(R)/D I)⁻¹ q by the two halves' R, less that of two different queries' scores; the
    mean over queries and checkpoints.
    """
    if not parts or len(parts[0].queries) < 2 or len(parts[0].rows) < 3:
        return Chosen(DEFAULT, {})
    agreement = {
        damping: float(np.mean([_agreement(part, damping) for part in parts])) for damping in GRID
    }
    enough = [damping for damping in GRID if agreement[damping] >= ENOUGH]
    return Chosen(enough[0] if enough else GRID[-1], agreement)


def _agreement(part: Part, damping: float) -> float:
    one, other = (_scores(part, half, damping) for half in part.halves)
    products = one @ other.T
    own, count = float(np.trace(products)), len(products)
    return own / count - (float(products.sum()) - own) / (count * (count - 1))


def _scores(part: Part, moments: np.ndarray, damping: float) -> np.ndarray:
    """float64 [q, n], of mean zero and norm one for each query."""
    solved = part.queries.astype(np.float64) @ inverse(moments, damping)
    scores = solved @ part.rows.astype(np.float64).T
    scores -= scores.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(scores, axis=1, keepdims=True)
    return np.divide(scores, norms, out=np.zeros_like(scores), where=norms > 0)
