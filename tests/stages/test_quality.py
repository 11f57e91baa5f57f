"""How a cohort is calibrated."""

import numpy as np

from tracin_beam.signals import ridge
from tracin_beam.stages import quality


def table(count, errors, likely):
    """Of two λ, whose likelihoods are greatest at these places of the temperatures."""
    rows = np.full((2, 2 + len(ridge.TEMPERATURES)), -100.0)
    rows[:, 0], rows[:, 1] = count, errors
    for row, place in zip(rows, likely, strict=True):
        row[2 + place] = -1
    return rows


def test_cohorts_have_their_own_temperature():
    judged = {
        (0, "trained", False): table(1000, [50, 10], [0, 1]),
        (0, "new", False): table(300, [30, 60], [2, 3]),
        (0, "unknown", False): table(9, [1, 1], [4, 4]),
    }
    warm = ridge.TEMPERATURES

    def chosen(cohort):
        (choice,) = quality.choices(judged, cohort).values()
        return choice.place, choice.temperature, choice.error

    # λ by all errors, 81 and 71; the few examples of a cohort are as all others.
    assert chosen("trained") == (1, warm[1], 10 / 1000)
    assert chosen("new") == (1, warm[3], 60 / 300)
    assert chosen("unknown") == (1, warm[1], 71 / 1309)
