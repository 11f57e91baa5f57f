"""k-means over rows whose inner products are scores: pure functions over arrays.

Of rows x = (√weight_c T_c^½ e_c)_c the inner products are scores, so that

    ‖x − x'‖² = score(z, z) + score(z', z') − 2 score(z, z'),

and a centre is near to the examples that would help, and be helped by, the same ones.
"""

import dataclasses

import numpy as np

# Rows whose distances are computed together.
_AT_ONCE = 8192


@dataclasses.dataclass(frozen=True)
class Sums:
    """What a centre's next place follows from; those of several parts add up.

    Attributes:
      rows: float64 [N], the sum of the rows of its cluster.
      count: how many these are.
    """

    rows: np.ndarray
    count: int

    def plus(self, other: "Sums") -> "Sums":
        """Those of both parts together."""
        return Sums(self.rows + other.rows, self.count + other.count)


def of_unit_length(rows: np.ndarray) -> np.ndarray:
    """float32 [n, N], each row divided by its length, so that only directions count."""
    lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    return (rows / np.maximum(lengths, 1e-30)[:, None]).astype(np.float32)


def seeds(rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Rows far from each other to begin with, by k-means++ (Arthur and Vassilvitskii 2007).

    Each next one is drawn with a probability that is proportional to its squared distance to the
    nearest so far; among rows that all lie on centres any other is taken.

    Args:
      rows: float32 [n, N], n ≥ count.
      count: how many.
      rng: draws them.

    Returns:
      float64 [count, N].
    """
    chosen = [int(rng.integers(len(rows)))]
    nearest = _squared_distances(rows, rows[chosen])[:, 0]
    while len(chosen) < count:
        nearest[chosen] = 0
        total = nearest.sum()
        if total > 0:
            following = int(rng.choice(len(rows), p=nearest / total))
        else:
            following = int(np.setdiff1d(np.arange(len(rows)), chosen)[0])
        chosen.append(following)
        nearest = np.minimum(nearest, _squared_distances(rows, rows[[following]])[:, 0])
    return rows[chosen].astype(np.float64)


def assign(rows: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centre of each row, of equals the first, and the distance to it.

    Args:
      rows: float32 [n, N].
      centres: float64 [K, N].

    Returns:
      int32 [n] and float64 [n].
    """
    cluster = np.empty(len(rows), np.int32)
    distance = np.empty(len(rows), np.float64)
    for start in range(0, len(rows), _AT_ONCE):
        some = rows[start : start + _AT_ONCE]
        nearest = np.argmin(_squared_distances(some, centres), axis=1)
        cluster[start : start + _AT_ONCE] = nearest
        # By the difference itself: a row that is its centre is at distance zero.
        beside = some - centres[nearest]
        distance[start : start + _AT_ONCE] = np.sqrt(np.einsum("nd,nd->n", beside, beside))
    return cluster, distance


def sums(rows: np.ndarray, cluster: np.ndarray) -> dict[int, Sums]:
    """By number of a cluster that has any, the sum of its rows."""
    return {
        int(k): Sums(rows[cluster == k].sum(axis=0, dtype=np.float64), int((cluster == k).sum()))
        for k in np.unique(cluster)
    }


def moved(
    centres: np.ndarray, seen: np.ndarray, found: dict[int, Sums], whole: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Where the centres are after a round.

    A centre becomes the mean of its rows. Where a round goes through a part of the rows only, it
    becomes the mean of all that it was given in all rounds (Sculley 2010). One that was given none
    stays where it is.

    Args:
      centres: float64 [K, N].
      seen: int64 [K], how many rows each is the mean of.
      found: the sums of a round, by cluster.
      whole: whether it went through all rows.

    Returns:
      The new centres and what they are the means of.
    """
    centres, seen = centres.copy(), seen.copy()
    for k, one in found.items():
        before = 0 if whole else seen[k]
        seen[k] = before + one.count
        centres[k] = (centres[k] * before + one.rows) / seen[k]
    return centres, seen


def _squared_distances(rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """float64 [n, K], up to float32's rounding of the products."""
    products = (rows @ centres.astype(np.float32).T).astype(np.float64)
    squares = np.einsum("nd,nd->n", rows, rows, dtype=np.float64)[:, None]
    squares = squares + np.einsum("kd,kd->k", centres, centres, dtype=np.float64)
    return np.maximum(squares - 2 * products, 0)
