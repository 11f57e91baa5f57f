"""What the nearest neighbours of an example in label-free features φ say of it and its label.

The neighbours of loss gradients are of no use here: those contain the label, so that their labels
agree almost by construction. Finding neighbours exactly costs a product of all pairs, in blocks.
"""

import numpy as np

_BLOCK = 1024  # queries whose distances are held at a time


def nearest(
    queries: np.ndarray, rows: np.ndarray, k: int, own: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of each query, nearest first.

    Args:
      queries: float [n, D], finite.
      rows: float [N, D], finite.
      k: how many; fewer where there are not so many others.
      own: int [n], the row that each query itself is, which is left out; None if it is none.

    Returns:
      Places in `rows`, int [n, k], and Euclidean distances, float64 [n, k].

    Raises:
      ValueError: there is no row, or no other than the query itself.
    """
    k = min(k, len(rows) - (own is not None))
    if k < 1:
        raise ValueError(f"{len(rows)} rows: there are no neighbours")
    # Squares of large numbers that are nearly alike would lose their difference.
    centre = rows.mean(axis=0, dtype=np.float64)
    rows, queries = rows - centre, queries - centre
    squares = np.square(rows).sum(axis=1)
    places = np.empty((len(queries), k), np.int64)
    distances = np.empty((len(queries), k))
    for start in range(0, len(queries), _BLOCK):
        block = queries[start : start + _BLOCK]
        far = squares - 2 * block @ rows.T
        if own is not None:
            far[np.arange(len(block)), own[start : start + _BLOCK]] = np.inf
        found = np.argpartition(far, k - 1, axis=1)[:, :k]
        # Of those few from differences, which are exact for duplicates.
        exact = np.sqrt(np.square(rows[found] - block[:, None]).sum(axis=2))
        order = np.lexsort((found, exact), axis=1)
        places[start : start + _BLOCK] = np.take_along_axis(found, order, axis=1)
        distances[start : start + _BLOCK] = np.take_along_axis(exact, order, axis=1)
    return places, distances


def agreement(label: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """Share of an example's neighbours that have its label: float64 [n].

    Args:
      label: [n].
      neighbours: [n, k], labels of the neighbours, the example itself left out.
    """
    return (neighbours == label[:, None]).mean(axis=1)


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


def near_duplicates(distances: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Whether neighbours are as good as the example itself: bool [n, k].

    Args:
      distances: [n, k], to the neighbours.
      share: of the median distance to a nearest neighbour, below which two examples count as one.
    """
    typical = np.median(distances[:, 0]) if len(distances) else 0.0
    near: np.ndarray = distances <= share * typical
    return near
