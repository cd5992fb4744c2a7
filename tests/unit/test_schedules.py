"""Learning-rate factors on numbers that a person can check."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from burnish.schedules.base import Schedule
from burnish.schedules.constant import Constant
from burnish.schedules.cosine import Cosine
from burnish.schedules.linear import Linear
from burnish.schedules.wsd import WSD


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [  # at progress 0, 1/4, 1/2, 3/4, 1
        (Constant(), [1, 1, 1, 1, 1]),
        (Linear(), [1, 0.75, 0.5, 0.25, 0]),
        (Linear(min_ratio=0.2), [1, 0.8, 0.6, 0.4, 0.2]),
        (Cosine(), [1, 0.5 + 0.5 * 0.5**0.5, 0.5, 0.5 - 0.5 * 0.5**0.5, 0]),
        (Cosine(min_ratio=0.1), [1, 0.1 + 0.9 * (0.5 + 0.5 * 0.5**0.5), 0.55, 0.1 + 0.9 * (0.5 - 0.5 * 0.5**0.5), 0.1]),
        (WSD(decay_ratio=0.5), [1, 1, 1, 0.5, 0]),
        (WSD(decay_ratio=1.0), [1, 0.75, 0.5, 0.25, 0]),
        (WSD(decay_ratio=0.5, min_ratio=0.5), [1, 1, 1, 0.75, 0.5]),
    ],
)
def test_factor_over_the_run(schedule: Schedule, expected: list[float]) -> None:
    factors = [schedule.factor(step=100, progress=progress / 4, num_steps=None) for progress in range(5)]
    assert factors == pytest.approx(expected, abs=1e-12)


def test_warm_up_rises_to_one_and_hands_over() -> None:
    schedule = Linear(warmup_steps=4)
    factors = [schedule.factor(step, step / 8, 8) for step in range(8)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_without_a_number_of_steps_the_decay_runs_beside_the_warm_up() -> None:
    schedule = Linear(warmup_steps=2)
    factors = [schedule.factor(step, step / 4, None) for step in range(4)]
    assert factors == [0.5 * 1.0, 1.0 * 0.75, 0.5, 0.25]


def test_no_step_of_a_warm_up_is_lost_to_a_factor_of_zero() -> None:
    assert Constant(warmup_steps=1).factor(0, 0.0, 10) == 1.0


@pytest.mark.parametrize("fields", [{"min_ratio": 1.5}, {"decay_ratio": 0.0}, {"decay_ratio": 1.1}])
def test_ratios_outside_their_range_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        WSD(**fields)  # pyright: ignore[reportArgumentType]
