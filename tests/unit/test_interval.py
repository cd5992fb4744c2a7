"""How often to save, by hand."""

from __future__ import annotations

import math

import pytest

from burnish.policy.checkpoint.interval import (
    DEVICE_HOURS,
    save_interval_seconds,
    save_interval_steps,
    time_lost,
)

HOUR = 3600.0


def test_the_interval_is_youngs():
    # sqrt(2 * 8 * 10,000) = 400 seconds, of steps that take 3.
    assert save_interval_seconds(8, 10_000) == 400
    assert save_interval_steps(8, 3, 10_000) == math.ceil(400 / 3)


def test_no_other_interval_loses_less():
    best = save_interval_seconds(60, 3 * HOUR)
    lost = [time_lost(factor * best, 60, 100, 3 * HOUR) for factor in (0.8, 0.97, 1, 1.03, 1.25)]
    assert min(lost) == lost[2]
    # 60 / T for saves, (T / 2 + 100) / M for failures, with T = sqrt(2 * 60 * 10,800) = 1,138.42.
    assert lost[2] == pytest.approx(60 / 1138.42 + (569.21 + 100) / 10_800, rel=1e-4)


@pytest.mark.parametrize(
    ("save", "between", "seconds", "why"),
    [
        (4, 10_000 * HOUR, HOUR, "sqrt(2 * 4 * 3.6e7) is 4.7 hours, and saving every hour costs 0.1 %"),
        (100, 10_000 * HOUR, 10_000, "every hour would cost 2.8 %: 1 % is every 10,000 seconds"),
        (600, 900, 900, "sqrt(2 * 600 * 900) is 1,039: a failure is expected before"),
        (600, 100, 600, "one save at a time"),
    ],
)
def test_the_interval_has_bounds(save: float, between: float, seconds: float, why: str):
    assert save_interval_seconds(save, between) == pytest.approx(seconds), why


def test_steps_are_at_least_one():
    assert save_interval_steps(0.01, 100, 60) == 1
    assert save_interval_steps(0, 100, 60) == 1


def test_nothing_is_left_where_failures_are_faster_than_restarts():
    assert time_lost(600, 60, 7200, HOUR) == 1


def test_the_failure_rate_is_the_published_one():
    assert pytest.approx(54 * 24 * 16_384 / 419, rel=0.02) == DEVICE_HOURS
