"""How likely a label is wrong, as a probability, from nothing but the given labels.

Evidence x of each example's class that knows nothing of its own label (leave-one-out probabilities,
votes of neighbours) is sharpened to π ∝ x^β, a given label is the true one k wrongly noted by a
matrix T of rates, and

    P(given g) = Σ_k π_k T_kg,        P(wrong | given g) = 1 − π_g T_gg / Σ_k π_k T_kg

β is that of the greatest likelihood of the given labels, and T follows from them by
expectation-maximisation (Dawid and Skene 1979, with one annotator). T is drawn to one rate for all
classes, by a prior that counts for `_PRIOR` of the examples: else it would take what is hard to
tell for wrong. Features of a network that learns examples by heart, as one of words may do at once,
know something of an example's own label: then too few are taken for wrong.
"""

import dataclasses

import numpy as np

from tracin_beam.signals import ridge

LARGEST = 1_000_000  # numbers of evidence that are looked at
_SHARPNESS = tuple(2 ** (power / 4) for power in range(13))
_PRIOR = 0.03
_ROUNDS = 40
_LEAST = 1e-4


@dataclasses.dataclass(frozen=True)
class Noise:
    """How labels are wrong.

    Attributes:
      sharpness: β.
      rates: float64 [K, K], T, whose rows, true classes, sum to 1.
    """

    sharpness: float
    rates: np.ndarray


def _sharpened(evidence: np.ndarray, sharpness: float) -> np.ndarray:
    return ridge.softmax(sharpness * np.log(np.maximum(evidence, _LEAST)))


def noise(evidence: np.ndarray, label: np.ndarray) -> Noise:
    """Fits β and T.

    Args:
      evidence: float [n, K], probabilities of classes.
      label: int [n], the given class.
    """
    n, classes = evidence.shape
    rates = np.full((classes, classes), 0.1 / max(1, classes - 1))
    np.fill_diagonal(rates, 0.9)
    order = np.argsort(label, kind="stable")
    given, starts = np.unique(label[order], return_index=True)
    best = -np.inf, Noise(1.0, rates)
    for sharpness in _SHARPNESS:
        true = _sharpened(evidence, sharpness)
        for _ in range(_ROUNDS):
            shares = true * rates[:, label].T
            shares /= shares.sum(axis=1, keepdims=True)
            counts = np.zeros((classes, classes))
            counts[:, given] = np.add.reduceat(shares[order], starts).T
            wrong = max(0.0, 1 - np.trace(counts) / n)
            usual = np.full((classes, classes), wrong / max(1, classes - 1))
            np.fill_diagonal(usual, 1 - wrong)
            rates = counts + _PRIOR * n / classes * usual
            rates /= rates.sum(axis=1, keepdims=True)
        likelihood = np.log((true * rates[:, label].T).sum(axis=1)).sum()
        if likelihood > best[0]:
            best = likelihood, Noise(sharpness, rates)
    return best[1]


def wrong(evidence: np.ndarray, label: np.ndarray, noise: Noise) -> np.ndarray:
    """The probability that the given label is wrong: float64 [n]."""
    shares = _sharpened(evidence, noise.sharpness) * noise.rates[:, label].T
    own = np.take_along_axis(shares, label[:, None], axis=1)[:, 0]
    return np.clip(1 - own / shares.sum(axis=1), 0, 1)


@dataclasses.dataclass(frozen=True)
class Curve:
    """A probability by score, which never falls.

    Attributes:
      score: float64 [s], rising.
      probability: float64 [s].
    """

    score: np.ndarray
    probability: np.ndarray

    def __call__(self, score: np.ndarray) -> np.ndarray:
        """Of some scores, between those that are known by straight lines: float64 [n]."""
        found: np.ndarray = np.interp(score, self.score, self.probability)
        return found


def judged(score: np.ndarray, evidence: np.ndarray, label: np.ndarray) -> Curve:
    """The probability of a wrong label by mislabel score.

    Args:
      score: float [n], n > 0.
      evidence: float [n, K], see `noise`.
      label: int [n].
    """
    return curve(score, wrong(evidence, label, noise(evidence, label)))


def curve(score: np.ndarray, probability: np.ndarray) -> Curve:
    """The rising curve that is nearest to some probabilities, in squares.

    Isotonic regression, by pooling of adjacent violators (Ayer et al. 1955).

    Args:
      score: float [n], n > 0.
      probability: float [n].
    """
    order = np.argsort(score, kind="stable")
    means: list[float] = []
    sizes: list[int] = []
    for value in probability[order].tolist():
        mean, size = value, 1
        while means and means[-1] >= mean:
            mean = (means[-1] * sizes[-1] + mean * size) / (sizes[-1] + size)
            size += sizes.pop()
            means.pop()
        means.append(mean)
        sizes.append(size)
    ends = np.cumsum(sizes)
    middle = np.add.reduceat(score[order], np.concatenate([[0], ends[:-1]])) / sizes
    return Curve(middle, np.array(means))
