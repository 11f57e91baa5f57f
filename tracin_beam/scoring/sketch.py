"""Rows sketched once more, so that a search tree over them is small."""

import numpy as np

DIM = 512


def sketch(rows: np.ndarray, seed: int = 0, dim: int = DIM) -> np.ndarray:
    """A CountSketch of rows; inner products keep their expectation.

    Charikar, Chen and Farach-Colton: Finding Frequent Items in Data Streams (2002). Every number
    goes, with a random sign, to one of `dim` places, as many to each.

    Args:
      rows: float32 [n, d].
      seed: of places and signs; rows that are to be compared need the same.
      dim: how many places.

    Returns:
      float32 [n, dim], or the rows as they are where they are no longer than that.
    """
    n, width = rows.shape
    if width <= dim:
        return rows
    rng = np.random.default_rng(seed)
    order = rng.permutation(width)
    signs = rng.choice(np.array([-1, 1], np.float32), width)
    out = np.zeros((n, dim), np.float32)
    for start in range(0, width, dim):
        at = order[start : start + dim]
        out[:, : len(at)] += rows[:, at] * signs[at]
    return out
