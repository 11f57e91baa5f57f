"""How many numbers must a projection keep? The recall to expect, estimated from a small sample.

The sample gives exact and estimated scores of some training examples for some queries. Its own
recall is what a training set of the sample's size would have. In a larger one the k-th and the
last candidate's scores lie further out in the tail, where their distance may be smaller against
the projection's error. So the sample's recall is lowered by what a model says that costs: the
tail of the exact scores as a generalised Pareto distribution, the error as normal.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

# What is tried, in this order.
DIMS = (256, 512, 1024, 2048, 4096, 8192, 16384)
# Share of a sample that its tail is fitted to, and the fewest examples that allow it.
_TAIL = 0.1
_FEWEST = 30
# A generalised Pareto's shape: one fitted to so few examples says no more. A normal tail looks
# shorter in a sample than it is.
_SHAPES = (-0.1, 0.5)
# Neighbours in rank over which the size of the error is averaged.
_NEIGHBOURS = 20


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a dim would give.

    Attributes:
      dim: length of an embedding.
      recall: expected, of the worse role.
      embedding_bytes: of all embedding files.
      index_bytes: of the index.
    """

    dim: int
    recall: float
    embedding_bytes: int
    index_bytes: int


def smallest(table: Sequence[Expected], wanted: float) -> Expected | None:
    """The first that reaches the recall, or None."""
    return next((row for row in table if row.recall >= wanted), None)


def expected_recall(
    exact: np.ndarray,
    estimate: np.ndarray,
    spread: np.ndarray,
    rows: int,
    top_k: int,
    candidates: int,
) -> float:
    """The share of the exact top k to expect among the candidates, for the worse role.

    Args:
      exact, estimate: float [n, queries], scores of the sampled training examples.
      spread: float [n, queries], ‖g‖·‖q‖: what the error is proportional to.
      rows: size of the training set.
      top_k: the k of recall@k.
      candidates: how many are fetched for a query and role.
    """
    exact, estimate = exact.astype(np.float64), estimate.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(spread > 0, (estimate - exact) / spread, 0.0)
    noise = math.sqrt(np.mean(relative**2)) * spread
    return min(
        _of_role(sign * exact, sign * estimate, noise, rows, top_k, candidates) for sign in (1, -1)
    )


def _of_role(
    exact: np.ndarray,
    estimate: np.ndarray,
    noise: np.ndarray,
    rows: int,
    top_k: int,
    candidates: int,
) -> float:
    own = sample_recall(exact, estimate, top_k, candidates)
    n = len(exact)
    if rows <= n or candidates >= rows:
        return own
    lost = tail_recall(exact, noise, n, top_k, candidates) - tail_recall(
        exact, noise, rows, top_k, candidates
    )
    return max(0.0, own - max(0.0, lost))


def sample_recall(exact: np.ndarray, estimate: np.ndarray, top_k: int, candidates: int) -> float:
    """The share of each column's exact top k among its estimated top candidates, on average."""
    top_k = min(top_k, len(exact))
    best = np.argsort(-exact, axis=0, kind="stable")[:top_k]
    found = np.argsort(-estimate, axis=0, kind="stable")[:candidates]
    taken = np.zeros(exact.shape, bool)
    np.put_along_axis(taken, found, True, axis=0)
    # Examples with equal scores stand for each other.
    worst = np.take_along_axis(exact, best[-1:], axis=0)
    hits = (taken & (exact >= worst)).sum(axis=0)
    return float(np.mean(np.minimum(hits, top_k) / top_k))


def tail_recall(
    exact: np.ndarray, noise: np.ndarray, rows: int, top_k: int, candidates: int
) -> float:
    """The model's recall@k of proponents for a training set of some size.

    Args:
      exact: float64 [n, queries], scores of a sample.
      noise: float64 [n, queries], standard deviations of the estimates' errors.
      rows: size of the training set.
      top_k: the k of recall@k.
      candidates: how many are fetched.
    """
    n = len(exact)
    m = min(max(_FEWEST, int(_TAIL * n)), n // 2)
    if m < 2 or candidates >= rows:
        return 1.0
    order = np.argsort(-exact, axis=0)
    scores = np.take_along_axis(exact, order, axis=0)
    noise = np.take_along_axis(noise, order, axis=0)
    threshold = scores[m]
    excess = scores[:m] - threshold
    shape = float(np.clip(np.mean(pareto_shapes(excess)), *_SHAPES))
    scale = excess.mean(axis=0) * (1 - shape)

    def quantile(p: np.ndarray) -> np.ndarray:
        """The score that a share p of the training set exceeds: [len(p), queries]."""
        steps = np.log(m / n / p) if abs(shape) < 1e-6 else ((p * n / m) ** -shape - 1) / shape
        return threshold + scale * steps[:, None]

    width = min(_NEIGHBOURS, m)

    def error(p: np.ndarray, score: np.ndarray) -> np.ndarray:
        """Standard deviation at these ranks; beyond the sample it grows as the score does."""
        first = np.clip(p * n - width / 2, 0, n - width).astype(int)
        mean_square = _window_means(noise**2, first, width)
        mean = _window_means(scores, first, width)
        with np.errstate(divide="ignore", invalid="ignore"):
            beyond = (first[:, None] == 0) & (mean > 0)
            growth = np.where(beyond, np.maximum(1.0, score / mean), 1.0)
        return np.sqrt(mean_square) * growth

    edges = np.geomspace(m / n, min(1 / rows, 1 / n) / 100, 300)
    middles, weights = np.sqrt(edges[1:] * edges[:-1]), edges[:-1] - edges[1:]
    tail = quantile(middles)
    values = np.concatenate([tail, scores[m:]])
    errors = np.maximum(np.concatenate([error(middles, tail), noise[m:]]), 1e-300)
    counts = rows * np.concatenate([weights, np.full(n - m, 1 / n)])[:, None]

    # The score from which on an estimate is among the candidates, by halving.
    low = values.min(axis=0) - 10 * errors.max(axis=0)
    high = values.max(axis=0) + 10 * errors.max(axis=0)
    for _ in range(45):
        middle = (low + high) / 2
        too_many = (counts * _exceeds(values, errors, middle)).sum(axis=0) > candidates
        low, high = np.where(too_many, middle, low), np.where(too_many, high, middle)
    ranks = np.minimum((np.arange(top_k) + 0.5) / rows, m / n)
    best = quantile(ranks)
    recall = _exceeds(best, np.maximum(error(ranks, best), 1e-300), high).mean(axis=0)
    # Where all scores of the tail are equal, any of them will do.
    return float(np.mean(np.where(scale > 0, recall, 1.0)))


def pareto_shapes(excess: np.ndarray) -> np.ndarray:
    """Shapes ξ of generalised Pareto distributions, by probability-weighted moments.

    After Hosking and Wallis, Technometrics 29 (1987), whose k is −ξ.

    Args:
      excess: float64 [m, columns], how far each exceeds the threshold, at least two.
    """
    m = len(excess)
    rising = np.sort(excess, axis=0)
    mean = rising.mean(axis=0)
    weighted = np.mean(rising * ((m - 1 - np.arange(m)) / (m - 1))[:, None], axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        shapes = 2 - mean / (mean - 2 * weighted)
    return np.where(np.isfinite(shapes), shapes, 0.0)


def _window_means(columns: np.ndarray, first: np.ndarray, width: int) -> np.ndarray:
    sums = np.concatenate([np.zeros((1, columns.shape[1])), np.cumsum(columns, axis=0)])
    return np.maximum(sums[first + width] - sums[first], 0) / width


def _exceeds(value: np.ndarray, error: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """The probability that a value with a normal error exceeds the threshold."""
    import tensorflow as tf

    distance = np.clip((threshold - value) / error, -40, 40)
    return 0.5 * tf.math.erfc(distance / math.sqrt(2)).numpy()
