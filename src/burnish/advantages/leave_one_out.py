"""Rewards less the mean of the group's others: RLOO."""

from __future__ import annotations

from typing import Literal

from burnish.advantages.arithmetic import less_group_mean, of_rollouts, owners
from burnish.advantages.base import Advantage, Advantages, Scored


class LeaveOneOut(Advantage):
    """r less the mean of the other rollouts of the prompt, the same for all tokens of a rollout.

    Kool et al., "Buy 4 REINFORCE samples, get a baseline for free!", 2019; Ahmadian et al., arXiv:2402.14740. The
    baseline does not know the rollout, so the gradient has no bias. It is G / (G - 1) (r - mean); 0 in a group of one.
    Penalties are taken off a rollout's reward.
    """

    type: Literal["leave_one_out"] = "leave_one_out"

    @property
    def needs_group(self) -> bool:
        return True

    def __call__(self, scored: Scored) -> Advantages:
        centred, number, _ = less_group_mean(of_rollouts(scored), scored.groups)
        return Advantages((centred * number / (number - 1).clamp(min=1))[owners(scored)])
