"""Rewards less their group's mean: Dr.GRPO."""

from __future__ import annotations

from typing import Literal

from burnish.advantages.arithmetic import less_group_mean, of_rollouts, owners
from burnish.advantages.base import Advantage, Advantages, Scored


class GroupMean(Advantage):
    """r - mean over the rollouts of a prompt, the same for all tokens of a rollout.

    Liu et al., arXiv:2503.20783, section 3.2: without the division, prompts that are nearly always or nearly never
    solved do not weigh more than others. Penalties are taken off a rollout's reward.
    """

    type: Literal["group_mean"] = "group_mean"

    @property
    def needs_group(self) -> bool:
        return True

    def __call__(self, scored: Scored) -> Advantages:
        centred, _, _ = less_group_mean(of_rollouts(scored), scored.groups)
        return Advantages(centred[owners(scored)])
