"""Signals of a training's course, by hand."""

import numpy as np
import pytest

from tracin_beam.signals import trajectory

# Two examples, three checkpoints, two classes.
P = np.array([[[0.8, 0.2], [0.4, 0.6], [0.9, 0.1]], [[0.5, 0.5], [0.1, 0.9], [0.2, 0.8]]])
LABEL = np.array([0, 1])


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (
            trajectory.aum,
            [np.log([0.8 / 0.2, 0.4 / 0.6, 9]).mean(), np.log([1, 9, 4]).mean()],
        ),
        (trajectory.probability_mean, [0.7, (0.5 + 0.9 + 0.8) / 3]),
        (trajectory.probability_std, [np.std([0.8, 0.4, 0.9]), np.std([0.5, 0.9, 0.8])]),
        (trajectory.forgetting, [1, 0]),
        (trajectory.el2n, [np.sqrt(2) * 0.2, np.sqrt(2) * 0.5]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_columns(function, expected):
    np.testing.assert_allclose(function(np.log(P), LABEL), expected, rtol=1e-12)
