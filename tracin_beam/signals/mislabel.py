"""How likely another label than the given one is, from the other examples and the network.

    m = (2·mean q + mean p) / 3

over the first half of the checkpoints: q from `ridge` on label-free features, with the example
itself left out, and p the network's own probabilities, which have seen the label. Early checkpoints
are taken since late ones have learnt the wrong labels too. 1 − m[given label] ranks examples; it is
no calibrated probability.
"""

import numpy as np


def first_half(checkpoints: int) -> int:
    """How many of the first checkpoints are taken: ⌊C/2⌋, at least one."""
    return max(1, checkpoints // 2)


def mixed(q: np.ndarray, p: np.ndarray) -> np.ndarray:
    """m [n, K], from leave-one-out and network probabilities [n, C', K] of early checkpoints."""
    return (2 * q.mean(axis=1) + p.mean(axis=1)) / 3


def scores(m: np.ndarray, label: np.ndarray) -> np.ndarray:
    """1 − m of the given class: float64 [n], in [0, 1], 1 the worst.

    Args:
      m: [n, K].
      label: int [n], the given class.
    """
    given: np.ndarray = np.take_along_axis(m, label[:, None], axis=1)[:, 0]
    return np.clip(1 - given, 0, 1)


def suggestions(m: np.ndarray) -> np.ndarray:
    """The class that is likeliest: int [n]."""
    return m.argmax(axis=1)


def best_other_ratio(m: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The likeliest other class's m over that of the given one: float64 [n].

    Above 1 another label is likelier; near 1 the example may be ambiguous.
    """
    given = np.take_along_axis(m, label[:, None], axis=1)[:, 0]
    others = m.copy()
    np.put_along_axis(others, label[:, None], -np.inf, axis=1)
    return others.max(axis=1) / np.maximum(given, 1e-12)


def separate_scores(m: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Of a multi-label task, for each label by itself, how likely it is the other: float64 [n, K].

    Args:
      m: [n, K], the probability of each label.
      label: [n, K] of zeros and ones.
    """
    return np.clip(np.where(label > 0.5, 1 - m, m), 0, 1)


def surprise(residual: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """Of a regression: how far a target is from what the others say, by how far they are there.

    Args:
      residual: float [n], target less its leave-one-out output.
      neighbours: float [n, k], the same of each example's nearest neighbours, itself left out.

    Returns:
      float64 [n]: |residual| over the root of their mean square; see `as_score`.
    """
    local = np.sqrt(np.square(neighbours).mean(axis=1))
    everywhere = np.sqrt(np.square(residual).mean())
    # A region that is fitted to the last digit must not make noise of it.
    return np.abs(residual) / np.maximum(local, 1e-3 * everywhere + 1e-30)


def as_score(surprise: np.ndarray) -> np.ndarray:
    """`surprise` s in [0, 1): s / (1 + s), of the same order."""
    return surprise / (1 + surprise)
