"""Training examples with their scores for queries, in columns, and the best of each query.

A query is a test example's number among those that can be used (`storage` and `stages` know its
place). Proponents are the greatest scores of a query, opponents the least.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

PROPONENT, OPPONENT = "proponent", "opponent"
ROLES = (PROPONENT, OPPONENT)
SIGNS = {PROPONENT: 1.0, OPPONENT: -1.0}

# What is held beyond the best, before it is looked through.
_SLACK = 4


class Candidates(NamedTuple):
    """Training examples with estimated scores.

    Attributes:
      query: int64 [n].
      shard: int32 [n], number of the shard among the training set's.
      position: int64 [n], in its shard.
      score: float64 [n].
    """

    query: np.ndarray
    shard: np.ndarray
    position: np.ndarray
    score: np.ndarray


class Scored(NamedTuple):
    """Training examples with scores of which each checkpoint's share is known.

    Attributes:
      query, shard, position, score: as of `Candidates`.
      by_checkpoint: float64 [n, C], whose sums are the scores.
    """

    query: np.ndarray
    shard: np.ndarray
    position: np.ndarray
    score: np.ndarray
    by_checkpoint: np.ndarray


class Judged(NamedTuple):
    """Training examples with both their exact and their estimated score.

    Attributes:
      query, shard, position: as of `Candidates`.
      exact, estimate: float64 [n].
      sampled: bool [n], whether the example is one of an even sample of all.
    """

    query: np.ndarray
    shard: np.ndarray
    position: np.ndarray
    exact: np.ndarray
    estimate: np.ndarray
    sampled: np.ndarray


Columns = TypeVar("Columns", Candidates, Scored, Judged)


def take(rows: Columns, index: np.ndarray) -> Columns:
    """The rows at these indices, or where a mask is true."""
    return type(rows)(*(column[index] for column in rows))


def merge(parts: Sequence[Columns]) -> Columns:
    """The rows of all parts, of which there is at least one."""
    columns = [np.concatenate(columns) for columns in zip(*parts, strict=True)]
    return type(parts[0])(*columns)


def best(rows: Columns, score: np.ndarray, count: int, role: str) -> Columns:
    """Each query's count greatest (of opponents, least) by a score.

    Args:
      rows: in any order, of any queries.
      score: float [n].
      count: how many of each query.
      role: proponent or opponent.

    Returns:
      Rows in the order of queries, the best first; ties in the order of shards and positions.
    """
    order = np.lexsort((rows.position, rows.shard, -SIGNS[role] * score, rows.query))
    kept = order[ranks_within(rows.query[order]) < count]
    return take(rows, kept)


def ranks_within(groups: np.ndarray) -> np.ndarray:
    """Counts from 0 within each run of equal values: int64 [n]."""
    places = np.arange(len(groups))
    if not len(groups):
        return places
    new = np.concatenate([[True], groups[1:] != groups[:-1]])
    return places - np.maximum.accumulate(np.where(new, places, 0))


def ends(scores: np.ndarray, count: int, role: str) -> tuple[np.ndarray, np.ndarray]:
    """Where each query's count best scores stand, with all that are equal to the last of them.

    Args:
      scores: float [queries, n].
      count: how many.
      role: proponent or opponent.

    Returns:
      int64 [m] each: queries in rising order, and columns.
    """
    query, column = np.nonzero(_reach(scores, _kth(scores, count, role), role))
    return query, column


def _kth(scores: np.ndarray, count: int, role: str) -> np.ndarray:
    """The count-th best score of each query, −∞ (of opponents ∞) where there are fewer."""
    n = scores.shape[1]
    if n < count:
        return np.full(len(scores), -np.inf * SIGNS[role], scores.dtype)
    at = n - count if role == PROPONENT else count - 1
    return np.partition(scores, at, axis=1)[:, at]


def _reach(scores: np.ndarray, bound: np.ndarray, role: str) -> np.ndarray:
    return scores >= bound[:, None] if role == PROPONENT else scores <= bound[:, None]


class Ends:
    """Both ends of each query's scores, over blocks of training examples.

    Holds some times the result, whatever the number of blocks. What does not reach the best so far
    costs one comparison.

    Args:
      queries: int64 [q], their numbers, rising.
      count: how many to keep of each query and role.
    """

    def __init__(self, queries: np.ndarray, count: int) -> None:
        self._queries = queries
        self._count = count
        self._bounds = {role: np.full(len(queries), -np.inf * SIGNS[role]) for role in ROLES}
        self._parts: dict[str, list[Candidates]] = {role: [] for role in ROLES}
        self._seen = 0

    def add(self, scores: np.ndarray, shard: np.ndarray, position: np.ndarray) -> None:
        """Adds training examples.

        Args:
          scores: float [q, n].
          shard: int32 [n].
          position: int64 [n].
        """
        count = self._count
        # A block tells more than the blocks before as long as these were small.
        fresh = scores.shape[1] >= max(count, self._seen)
        self._seen += scores.shape[1]
        for role in ROLES:
            bound = self._bounds[role].astype(scores.dtype)
            if fresh:
                own = _kth(scores, count, role)
                bound = np.maximum(bound, own) if role == PROPONENT else np.minimum(bound, own)
            query, column = np.nonzero(_reach(scores, bound, role))
            parts = self._parts[role]
            parts.append(
                Candidates(
                    self._queries[query],
                    shard[column],
                    position[column],
                    scores[query, column].astype(np.float64),
                )
            )
            held = sum(len(part.score) for part in parts)
            if fresh or held > (1 + _SLACK) * count * len(self._queries):
                self._look_through(role)

    def _look_through(self, role: str) -> None:
        rows = merge(self._parts[role])
        rows = best(rows, rows.score, self._count, role)
        self._parts[role] = [rows]
        last = np.flatnonzero(ranks_within(rows.query) == self._count - 1)
        self._bounds[role][np.searchsorted(self._queries, rows.query[last])] = rows.score[last]

    def of(self, role: str) -> Candidates:
        """The best so far, as `best` gives them."""
        if not self._parts[role]:
            nothing = np.empty(0, np.int64)
            return Candidates(nothing, nothing.astype(np.int32), nothing, np.empty(0))
        self._look_through(role)
        return self._parts[role][0]
