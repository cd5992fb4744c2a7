"""Advantage estimators by hand, and against loops in plain Python."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from burnish.advantages.arithmetic import discounted
from burnish.advantages.base import Advantage, Scored
from burnish.advantages.gae import GAE
from burnish.advantages.group_mean import GroupMean
from burnish.advantages.group_norm import GroupNorm
from burnish.advantages.leave_one_out import LeaveOneOut
from burnish.advantages.reinforce_pp import ReinforcePP

PENALTIES = [0.1, 0.0, 0.2, 0.1, 0.0, 0.0, 0.3, 0.0]
VALUES = [0.5, 0.2, 0.4, 0.3, 1.0, 1.5, 0.0, 2.5]
ALL = [GroupNorm(), GroupMean(), LeaveOneOut(), ReinforcePP(), ReinforcePP(baseline="group"), GAE()]


def float64(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scored(
    rewards: list[float],
    groups: list[int],
    lengths: list[int],
    penalties: list[float] | None = None,
    values: list[float] | None = None,
) -> Scored:
    return Scored(
        float64(rewards),
        torch.tensor(groups),
        torch.tensor(lengths),
        None if penalties is None else float64(penalties),
        None if values is None else float64(values),
    )


def step(*, penalties: bool = False) -> Scored:
    """Two groups of two rollouts, of 3, 1, 2 and 2 tokens; with penalties the rewards are .7, -.1, 2 and 1.7."""
    return scored([1.0, 0.0, 2.0, 2.0], [0, 0, 1, 1], [3, 1, 2, 2], PENALTIES if penalties else None, VALUES)


def spread(values: list[float]) -> list[float]:
    """Of the four rollouts of `step`, at their tokens."""
    return [value for value, length in zip(values, [3, 1, 2, 2], strict=True) for _ in range(length)]


def whitened(values: list[float]) -> list[float]:
    mean, std = statistics.fmean(values), statistics.stdev(values)
    return [(value - mean) / std for value in values]


WIDE, NARROW = 0.4 / (math.sqrt(0.32) + 1), 0.15 / (math.sqrt(0.045) + 1)
NORM = 0.5 / (math.sqrt(0.5) + 1e-4)  # mean 0.5, squares 0.25 and 0.25 over G - 1 = 1
RETURNS = [0.1, 0.4, 0.8, -0.1, 1.0, 2.0, 0.7, 2.0]
"""At gamma 0.5 of token rewards [-.1, 0, 1 - .2], [-.1], [0, 2] and [-.3, 2]."""


@pytest.mark.parametrize(
    ("advantage", "penalties", "expected"),
    [
        (GroupNorm(), False, spread([NORM, -NORM, 0.0, 0.0])),
        (GroupNorm(eps=1.0), True, spread([WIDE, -WIDE, NARROW, -NARROW])),
        (GroupMean(), False, spread([0.5, -0.5, 0.0, 0.0])),
        (GroupMean(), True, spread([0.4, -0.4, 0.15, -0.15])),
        (LeaveOneOut(), False, spread([1.0, -1.0, 0.0, 0.0])),
        (LeaveOneOut(), True, spread([0.8, -0.8, 0.3, -0.3])),
        (ReinforcePP(whiten=False), False, spread([1.0, 0.0, 2.0, 2.0])),
        (ReinforcePP(gamma=0.5, whiten=False), True, RETURNS),
        (ReinforcePP(gamma=0.5), True, whitened(RETURNS)),
        # rewards .5, -.5, 0 and 0, so [-.1, 0, .3], [-.6], [0, 0] and [-.3, 0]
        (
            ReinforcePP(gamma=0.5, baseline="group", whiten=False),
            True,
            [-0.025, 0.15, 0.3, -0.6, 0.0, 0.0, -0.3, 0.0],
        ),
        (ReinforcePP(gamma=0.0, whiten=False), True, [-0.1, 0.0, 0.8, -0.1, 0.0, 2.0, -0.3, 2.0]),
    ],
    ids=str,
)
def test_by_hand(advantage: Advantage, penalties: bool, expected: list[float]) -> None:
    found = advantage(step(penalties=penalties))
    assert found.advantages.tolist() == pytest.approx(expected, abs=1e-7)
    assert found.advantages.dtype == torch.float64 and found.returns is None


def test_gae_by_hand() -> None:
    """gamma 0.9, lam 0.8: deltas [.9 * .2 - .5, .9 * .4 - .2, 1 - .4] = [-.32, .16, .6] are summed with 0.72."""
    found = GAE(gamma=0.9, lam=0.8, whiten=False)(step())
    expected = [0.10624, 0.592, 0.6, -0.3, 0.9 * 1.5 - 1 + 0.72 * 0.5, 0.5, 0.9 * 2.5 - 0.72 * 0.5, -0.5]
    assert found.advantages.tolist() == pytest.approx(expected)
    assert found.returns is not None
    assert found.returns.tolist() == pytest.approx([a + v for a, v in zip(expected, VALUES, strict=True)])
    white = GAE(gamma=0.9, lam=0.8)(step())
    assert white.advantages.tolist() == pytest.approx(whitened(expected), abs=1e-7)
    assert white.returns is not None and white.returns.tolist() == pytest.approx(found.returns.tolist())


def test_gae_takes_penalties_off_each_token() -> None:
    """lam 1, gamma 1: returns are sums of rewards, whatever the values are."""
    found = GAE(lam=1.0, whiten=False)(step(penalties=True))
    expected = [1.0 - 0.3, 1.0 - 0.2, 1.0 - 0.2, -0.1, 2.0, 2.0, 2.0 - 0.3, 2.0]
    assert found.returns is not None and found.returns.tolist() == pytest.approx(expected)
    assert found.advantages.tolist() == pytest.approx([r - v for r, v in zip(expected, VALUES, strict=True)])


@pytest.mark.parametrize("advantage", [GroupNorm(), GroupMean(), LeaveOneOut()], ids=lambda a: a.type)
def test_equal_rewards_teach_exactly_nothing(advantage: Advantage) -> None:
    """The mean of three times 0.1 is not 0.1 in binary; nor is a group of one compared with anything."""
    found = advantage(scored([0.1, 0.1, 0.1, 7.0], [3, 3, 3, 5], [1, 2, 1, 2])).advantages
    assert found.tolist() == [0.0] * 6


@pytest.mark.parametrize("advantage", ALL, ids=str)
def test_a_rollout_without_tokens_is_a_baseline_only(advantage: Advantage) -> None:
    """Rewards 3, 0, 0 of rollouts of 2, 0 and 1 tokens; the second is in the group's mean of 1."""
    found = advantage(scored([3.0, 0.0, 0.0], [0, 0, 0], [2, 0, 1], values=[0.0, 0.0, 0.0])).advantages
    expected = {
        "group_norm": [2 / (3**0.5 + 1e-4)] * 2 + [-1 / (3**0.5 + 1e-4)],
        "group_mean": [2.0, 2.0, -1.0],
        "leave_one_out": [3.0, 3.0, -1.5],
        "reinforce_pp": whitened([2.0, 2.0, -1.0] if advantage.needs_group else [3.0, 3.0, 0.0]),
        "gae": whitened([2.85, 3.0, 0.0]),
    }
    assert found.tolist() == pytest.approx(expected[advantage.type], abs=1e-7)


@pytest.mark.parametrize("advantage", ALL, ids=str)
def test_what_was_not_sampled_at_all(advantage: Advantage) -> None:
    nothing = advantage(scored([1.0, 0.0], [0, 0], [0, 0], [], [])).advantages
    one = advantage(scored([2.0, 0.0], [0, 0], [1, 0], [0.5], [0.25])).advantages
    assert nothing.tolist() == []
    assert len(one) == 1 and one.isfinite().all()


def test_groups_may_lie_in_any_order() -> None:
    rewards, groups = [1.0, 5.0, 0.0, 9.0, 2.0], [7, 2, 7, 2, 7]
    found = GroupMean()(scored(rewards, groups, [1] * 5)).advantages
    assert found.tolist() == [0.0, -2.0, -1.0, 2.0, 1.0]


@pytest.mark.parametrize("factor", [0.0, 0.37, 1.0])
def test_discounted_is_the_loop(factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([5, 0, 1, 17, 3])
    values = torch.randn(26, generator=generator, dtype=torch.float64)
    expected: list[float] = []
    for part in values.split(lengths.tolist()):
        carried, own = 0.0, []
        for value in reversed(part.tolist()):
            carried = value + factor * carried
            own.append(carried)
        expected += own[::-1]
    assert discounted(values, lengths, factor).tolist() == pytest.approx(expected, rel=1e-14)


def test_what_each_needs() -> None:
    assert [a.needs_group for a in ALL] == [True, True, True, False, True, False]
    assert [a.needs_values for a in ALL] == [False] * 5 + [True]
