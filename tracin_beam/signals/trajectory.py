"""What the checkpoints of a training say of each example: one function for each column.

Functions take log-probabilities [n, C, K] and the given classes [n]; p is the given one's
probability. They are columns of the quality tables.
"""

import numpy as np

from tracin_beam.signals.mislabel import first_half


def _given(log_probabilities: np.ndarray, label: np.ndarray) -> np.ndarray:
    return np.take_along_axis(log_probabilities, label[:, None, None], axis=2)[:, :, 0]


def _best_other(log_probabilities: np.ndarray, label: np.ndarray) -> np.ndarray:
    others = log_probabilities.astype(np.float64)
    np.put_along_axis(others, label[:, None, None], -np.inf, axis=2)
    best: np.ndarray = others.max(axis=2)
    return best


def aum(log_probabilities: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Area under the margin: the given class's logit less the greatest other's, on average.

    Pleiss et al. 2020. Differences of log-probabilities are those of logits.
    """
    margin = _given(log_probabilities, label) - _best_other(log_probabilities, label)
    return margin.mean(axis=1)


def probability_mean(log_probabilities: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Confidence: mean of the given class's probability (Swayamdipta et al. 2020)."""
    return np.exp(_given(log_probabilities, label)).mean(axis=1)


def probability_std(log_probabilities: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Variability: spread of the given class's probability (Swayamdipta et al. 2020)."""
    return np.exp(_given(log_probabilities, label)).std(axis=1)


def forgetting(log_probabilities: np.ndarray, label: np.ndarray) -> np.ndarray:
    """How often it was predicted as given, and no more at the next checkpoint.

    Toneva et al. 2019, who count at every step.
    """
    right = log_probabilities.argmax(axis=2) == label[:, None]
    return (right[:, :-1] & ~right[:, 1:]).sum(axis=1).astype(np.float64)


def el2n(log_probabilities: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Mean norm of probabilities less the one-hot label, early in training (Paul et al. 2021)."""
    early = np.exp(log_probabilities[:, : first_half(log_probabilities.shape[1])])
    wanted = np.eye(early.shape[2])[label][:, None]
    return np.linalg.norm(early - wanted, axis=2).mean(axis=1)


COLUMNS = (aum, probability_mean, probability_std, forgetting, el2n)
