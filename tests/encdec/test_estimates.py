"""Intervals between checkpoints: Daly's optimum against the expected run time that it minimizes."""

from __future__ import annotations

import math

import pytest

from encdec.estimates import checkpoint_interval_seconds, daly_interval_seconds


def time_per_work(interval: float, cost: float, mean: float) -> float:
    """Expected wall time over work, interrupts at random, restart at no cost (Daly 2006, equation 13)."""
    return mean / interval * (math.exp((interval + cost) / mean) - 1)


@pytest.mark.parametrize("mean", [600.0, 86_400.0, 1e6])
@pytest.mark.parametrize("cost", [0.05, 1.0, 30.0, 300.0])
def test_no_other_interval_is_better_by_a_thousandth(cost: float, mean: float):
    chosen = time_per_work(daly_interval_seconds(cost, mean), cost, mean)
    others = [daly_interval_seconds(cost, mean) * factor for factor in (0.25, 0.5, 0.7, 0.9, 1.1, 1.4, 2.0, 4.0)]
    assert chosen <= 1.001 * min(time_per_work(other, cost, mean) for other in others)


def test_first_order_is_youngs():
    assert daly_interval_seconds(0.5, 86_400) == pytest.approx(math.sqrt(2 * 0.5 * 86_400), rel=0.01)


def test_cost_beyond_all_reason_means_the_mean():
    assert daly_interval_seconds(100.0, 50.0) == 50.0


def test_at_most_half_of_the_time_is_spent_writing():
    assert checkpoint_interval_seconds(0.1, 300.0, 86_400) == 600.0
    assert checkpoint_interval_seconds(0.1, 1.0, 86_400) == daly_interval_seconds(0.1, 86_400)
