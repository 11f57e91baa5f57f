"""What the nearest neighbours of an example in label-free features φ say of it and its label.

The neighbours of loss gradients are of no use here: those contain the label, so that their labels
agree almost by construction. Finding neighbours exactly costs a product of all pairs, in blocks.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

COUNT = 10  # neighbours that an example is judged by
_BLOCK = 1024  # queries whose distances are held at a time
_FLOATS = 1 << 24  # numbers of rows that are compared once more, held at a time


@dataclasses.dataclass(frozen=True)
class Found:
    """Nearest rows of n queries, nearest first; where there are not k, the rest has shard −1.

    Attributes:
      shard: int32 [n, k], number of the shard that a row is of.
      row: int32 [n, k], its place there.
      distance: float32 [n, k], Euclidean; ∞ where there is none.
    """

    shard: np.ndarray
    row: np.ndarray
    distance: np.ndarray

    def take(self, index: np.ndarray | slice) -> "Found":
        """Of the queries at these indices."""
        return Found(self.shard[index], self.row[index], self.distance[index])

    def first(self, k: int) -> "Found":
        """The k nearest of each query."""
        return Found(self.shard[:, :k], self.row[:, :k], self.distance[:, :k])


def nothing(n: int, k: int) -> Found:
    """No rows yet for n queries."""
    none = np.full((n, k), -1, np.int32)
    return Found(none, none.copy(), np.full((n, k), np.inf, np.float32))


class Nearest:
    """The k nearest of rows that come piece by piece, exactly.

    Holds the queries, and a block of distances at a time. What is not nearer than the k-th nearest
    so far costs its part of the product and one comparison.

    Args:
      queries: float [n, D], finite.
      k: how many.
      known: what was found among other rows before.
    """

    def __init__(self, queries: np.ndarray, k: int, known: Found | None = None) -> None:
        n = len(queries)
        # Squares of large numbers that are nearly alike would lose their difference.
        self._centre = queries.mean(axis=0, dtype=np.float64) if n else np.zeros(queries.shape[1])
        self._queries = (queries - self._centre).astype(np.float32)
        self._squares = np.square(self._queries).sum(axis=1)
        self._k = k
        self.found = known or nothing(n, k)

    def add(
        self,
        rows: np.ndarray,
        shard: int,
        places: np.ndarray,
        own: np.ndarray | None = None,
        only: np.ndarray | None = None,
    ) -> None:
        """Compares the queries with a piece of a shard.

        Args:
          rows: float [m, D], finite.
          shard: number of the shard that they are of.
          places: int [m], where they stand there.
          own: int [n], which of these rows a query itself is, which is left out; other numbers
            than 0 to m − 1 where it is none of them.
          only: the queries that are compared, int [q], rising; all by default.
        """
        rows = (rows - self._centre).astype(np.float32)
        squares = np.square(rows).sum(axis=1)
        rounding = 1e-5 * (squares.max(initial=0) + self._squares.max(initial=0))
        k = min(self._k, len(rows))
        size = max(1, min(_BLOCK, _FLOATS // max(1, k * rows.shape[1])))
        asked = np.arange(len(self._queries)) if only is None else only
        for start in range(0, len(asked) if k else 0, size):
            at = asked[start : start + size]
            block = self._queries[at]
            far = squares - 2 * block @ rows.T
            if own is not None:
                mine = np.flatnonzero((own[at] >= 0) & (own[at] < len(rows)))
                far[mine, own[at][mine]] = np.inf
            bound = np.square(self.found.distance[at, -1]) - self._squares[at] + rounding
            hit = np.flatnonzero(far.min(axis=1) <= bound)
            if len(hit):
                self._merge(at[hit], far[hit], block[hit], rows, shard, places)

    def _merge(
        self,
        at: np.ndarray,
        far: np.ndarray,
        block: np.ndarray,
        rows: np.ndarray,
        shard: int,
        places: np.ndarray,
    ) -> None:
        k = min(self._k, len(rows))
        near = np.argpartition(far, k - 1, axis=1)[:, :k]
        # Of those few from differences, which are exact for duplicates.
        exact = np.sqrt(np.square(rows[near] - block[:, None]).sum(axis=2))
        exact[np.isinf(np.take_along_axis(far, near, axis=1))] = np.inf
        none = np.isinf(exact)
        old = self.found.take(at)
        parts = (
            np.concatenate([old.shard, np.where(none, -1, shard).astype(np.int32)], axis=1),
            np.concatenate([old.row, np.where(none, -1, places[near]).astype(np.int32)], axis=1),
            np.concatenate([old.distance, exact], axis=1),
        )
        order = np.lexsort((parts[1], parts[0], parts[2]), axis=1)[:, : self._k]
        for kept, part in zip(vars(self.found).values(), parts, strict=True):
            kept[at] = np.take_along_axis(part, order, axis=1)


def agreement(label: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """Share of an example's neighbours that have its label: float64 [n].

    The vote of the edited nearest neighbour rule (Wilson 1972); of a multi-label task the share of
    labels.

    Args:
      label: [n], or [n, L] of a multi-label task.
      neighbours: [n, k], or [n, k, L]: labels of the neighbours, the example itself left out.
    """
    same: np.ndarray = neighbours == label[:, None]
    return same.reshape(len(label), -1).mean(axis=1)


def outlyingness(distances: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """How far an example is from others, by how far its neighbours are from theirs: float64 [n].

    The simplified local outlier factor (Schubert, Zimek and Kriegel 2014): near 1 where an example
    lies as densely as its neighbours do, larger for outliers.

    Args:
      distances: [n, k], to the neighbours.
      neighbours: [n, k], the mean of the same distances of each neighbour.
    """
    own, around = distances.mean(axis=1), neighbours.mean(axis=1)
    # Among exact duplicates there are no distances to compare with.
    return np.where(own > 0, own / np.maximum(around, np.finfo(np.float64).tiny), 1.0)


@dataclasses.dataclass(frozen=True)
class Around:
    """n examples and their neighbours, for the columns of `COLUMNS`.

    Attributes:
      label: [n], or [n, L] of a multi-label task.
      labels: [n, k] or [n, k, L], of the neighbours.
      distances: float [n, k], to the neighbours.
      usual: float [n, k], the mean of the same distances of each neighbour.
    """

    label: np.ndarray
    labels: np.ndarray
    distances: np.ndarray
    usual: np.ndarray


def neighbour_agreement(around: Around) -> np.ndarray:
    """Share of the nearest others that have its label; NaN where it has none."""
    known = np.isfinite(around.label).reshape(len(around.label), -1).all(axis=1)
    return np.where(known, agreement(around.label, around.labels), np.nan)


def neighbour_distance(around: Around) -> np.ndarray:
    """Mean distance to the nearest others in φ."""
    return around.distances.mean(axis=1)


def neighbour_outlyingness(around: Around) -> np.ndarray:
    """That distance over the same of those others (Schubert, Zimek and Kriegel 2014)."""
    return outlyingness(around.distances, around.usual)


COLUMNS: Mapping[str, Callable[[Around], np.ndarray]] = {
    one.__name__: one for one in (neighbour_agreement, neighbour_distance, neighbour_outlyingness)
}
