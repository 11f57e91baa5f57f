"""How likely another label than the given one is, from the other examples and the network.

    m ∝ (q³ p² v)^(1/6)

of three that err in different ways: q from `ridge` on label-free features of the first half of the
checkpoints, with the example itself left out, a mean over checkpoints; p, the network's own
probabilities in the middle of training, which have seen the label; and v, the votes of the nearest
others in these features. Early checkpoints are taken since late ones have learnt the wrong labels
too. The score of the given label against the best other one is no probability; see
`confidence`.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# Shares of the examples, the surest first, in which disagreeing labels are counted, and the fewest
# that are worth it; of a normal distribution the point that nineteen in twenty lie below.
_SUREST, _FEWEST = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5), 40
_Z = 1.645
_LEAST_SPREAD = 0.2  # of the mean one


def first_half(checkpoints: int) -> int:
    """How many of the first checkpoints are taken: ⌊C/2⌋, at least one."""
    return max(1, checkpoints // 2)


def mixed(q: np.ndarray, p: np.ndarray) -> np.ndarray:
    """(2·mean q + mean p) / 3 of [n, C', K] at early checkpoints: [n, K], a simple m."""
    return (2 * q.mean(axis=1) + p.mean(axis=1)) / 3


def joined(q: np.ndarray, p: np.ndarray, votes: np.ndarray) -> np.ndarray:
    """m of classes: float64 [n, K].

    A product lets what is sure of a class outweigh what is not; none of the three counts for less
    than a tenth of an even share, so that none rules a class out.

    Args:
      q: [n, C', K], leave-one-out probabilities at early checkpoints.
      p: [n, K], the network's, at `first_half`'s last.
      votes: [n, K], see `votes`.
    """
    least = 0.1 / p.shape[1]
    logs = (np.log(np.maximum(part, least)) for part in (q.mean(axis=1), p, votes))
    m = np.exp(sum(w * part for w, part in zip((3, 2, 1), logs, strict=True)) / 6)
    return m / m.sum(axis=1, keepdims=True)


def votes(labels: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Shares of classes among an example's neighbours and one more, like all examples: [n, K].

    Args:
      labels: [n, k], of the neighbours; what is no class does not vote.
      shares: [K], of classes among all examples.
    """
    same = labels[:, :, None] == np.arange(len(shares))
    counted = same.sum(axis=1) + shares
    return counted / counted.sum(axis=1, keepdims=True)


def scores(m: np.ndarray, label: np.ndarray) -> np.ndarray:
    """How bad the given label is: 1 / (1 + m_given / √m_other), float64 [n] in [0, 1], 1 the worst.

    Between 1 − m_given, which is best where any other label may have been given, and the ratio to
    the best other one, which is best where labels are taken for one that is alike.

    Args:
      m: [n, K].
      label: int [n], the given class.
    """
    given, other = _given_and_other(m, label)
    return 1 / (1 + given / np.sqrt(np.maximum(other, 1e-12)))


def suspected(signals: pa.Table, kind: str) -> pa.ChunkedArray:
    """The examples of which another label is likelier than their own: bool [n], or null.

    Of a regression: whose target is further from what the others say than three times the usual.

    Args:
      signals: with "best_other_ratio" and "mislabel_score".
      kind: of the task.
    """
    if kind == "classification":
        return pc.greater(signals["best_other_ratio"], 1.0)
    return pc.greater(signals["mislabel_score"], 0.75 if kind == "regression" else 0.5)


def suggestions(m: np.ndarray) -> np.ndarray:
    """The class that is likeliest: int [n]."""
    return m.argmax(axis=1)


def best_other_ratio(m: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The likeliest other class's m over that of the given one: float64 [n].

    Above 1 another label is likelier; near 1 the example may be ambiguous.
    """
    given, other = _given_and_other(m, label)
    return other / np.maximum(given, 1e-12)


def _given_and_other(m: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """m of the given class, and of the likeliest other one: [n] each."""
    others = m.copy()
    np.put_along_axis(others, label[:, None], -np.inf, axis=1)
    return np.take_along_axis(m, label[:, None], axis=1)[:, 0], others.max(axis=1)


def confident(q: np.ndarray, usual: np.ndarray) -> np.ndarray:
    """The class that an example is confidently taken for: int [n], -1 for none.

    The likeliest of the classes whose probability is at least what it is on average among examples
    that are given this class (Northcutt, Jiang and Chuang 2021, equation 2).

    Args:
      q: [n, K], probabilities that know nothing of the example's own label.
      usual: [K], that average for each class; NaN for a class without examples.
    """
    reached = np.where(q >= usual, q, -1.0)
    return np.where(reached.max(axis=1) >= 0, reached.argmax(axis=1), -1)


def wrong_labels(
    label: np.ndarray, taken_for: np.ndarray, likeliest: np.ndarray, probability: np.ndarray
) -> tuple[int, int]:
    """Between which numbers the wrong labels are.

    Above, the off-diagonal of the confident joint, of which each row is scaled to the examples that
    are given this class (Northcutt et al. 2021, equation 3), with what chance may add to such a
    count. It takes examples that are hard for wrong ones, so that it is too high rather than too
    low, unless labels are mostly wrong where classes cannot be told from each other.

    Below, disagreements among the examples whose likeliest class is surest. There a classifier is
    hardly ever wrong, so that what disagrees is a wrong label, and there are as many among the
    others or more, who are harder to label (the anchor points of Liu and Tao 2016, and Patrini et
    al. 2017). It is the least, over shares of the surest, of the lower limits at 95 % of that
    rate (Wilson 1927). Labels that are wrong more often where the class is clear would break it.

    Args:
      label: int [n], the given class.
      taken_for: int [n], by `confident`.
      likeliest: int [n], the likeliest class by the same probabilities.
      probability: float [n], its.
    """
    n = len(label)
    if not n:
        return 0, 0
    known = taken_for >= 0
    counted = np.bincount(label[known], minlength=label.max() + 1)
    other = known & (taken_for != label)
    shares = np.bincount(label[other], minlength=len(counted)) / np.maximum(counted, 1)
    expected = float(shares @ np.bincount(label, minlength=len(counted)))
    high = min(n, round(expected + _Z * np.sqrt(expected)))
    unlike = (likeliest != label)[np.argsort(-probability, kind="stable")]
    sizes = np.unique([min(n, max(_FEWEST, round(share * n))) for share in _SUREST])
    rates = np.cumsum(unlike)[sizes - 1] / sizes
    spread = _Z * np.sqrt(rates * (1 - rates) / sizes + _Z**2 / (4 * sizes**2))
    lowest = (rates + _Z**2 / (2 * sizes) - spread) / (1 + _Z**2 / sizes)
    return min(int(n * lowest.min()), high), high


def separate_scores(m: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Of a multi-label task, for each label by itself, how likely it is the other: float64 [n, K].

    Args:
      m: [n, K], the probability of each label.
      label: [n, K] of zeros and ones.
    """
    return np.clip(np.where(label > 0.5, 1 - m, m), 0, 1)


def surprise(residual: np.ndarray, local: np.ndarray, everywhere: float) -> np.ndarray:
    """Of a regression: how far a target is from what the others say, by how far they are there.

    Args:
      residual: float [n], target less its leave-one-out output.
      local: float [n], the mean |residual| that is expected of an example like it.
      everywhere: the mean |residual| of all.

    Returns:
      float64 [n]: |residual| over the standard deviation of a normal distribution with this mean
      |residual|; see `as_score`.
    """
    # Where it is expected to be next to nothing, or less, the fit has only too little to go by.
    expected = np.maximum(local, _LEAST_SPREAD * everywhere + 1e-30)
    return np.abs(residual) / (np.sqrt(np.pi / 2) * expected)


def as_score(surprise: np.ndarray) -> np.ndarray:
    """`surprise` s in [0, 1): s / (1 + s), of the same order."""
    return surprise / (1 + surprise)
