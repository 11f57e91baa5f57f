"""Which checkpoints are taken, and what each counts."""

import pytest

from tracin_beam.planning import checkpoints


def test_evenly_spread_ones_end_with_the_last():
    assert checkpoints.evenly(10, 3) == [2, 5, 9]
    assert checkpoints.evenly(3, 5) == [0, 1, 2]


def test_those_before_which_the_loss_fell_most():
    losses = [2.3, 1.0, 0.9, 0.95, 0.3, 0.29]
    assert checkpoints.by_fall(losses, 1) == [0]
    assert checkpoints.by_fall(losses, 3) == [0, 1, 4]
    assert checkpoints.by_fall(losses, 9) == [0, 1, 2, 3, 4, 5]


def test_a_rate_is_the_mean_of_its_interval():
    rates = [1.0, 0.5, 0.25, 0.125, 8.0]
    assert checkpoints.mean_rates(rates, [1, 3]) == [0.75, 0.1875]
    assert checkpoints.mean_rates(rates, [0, 4]) == [1.0, pytest.approx(8.875 / 4)]
    assert checkpoints.mean_rates(rates, range(5)) == rates
