"""Group-normalised rewards: GRPO."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Gt

from burnish.advantages.arithmetic import less_group_mean, of_rollouts, owners
from burnish.advantages.base import Advantage, Advantages, Scored


class GroupNorm(Advantage):
    """(r - mean) / (std + eps) over the rollouts of a prompt, the same for all tokens of a rollout.

    Shao et al., arXiv:2402.03300, section 4.1.2; the standard deviation is the unbiased one, over G - 1. A group of
    equal rewards gives 0, and so does a group of one. Penalties are taken off a rollout's reward.
    """

    type: Literal["group_norm"] = "group_norm"
    eps: Annotated[float, Gt(0)] = 1e-4
    """Added to the standard deviation."""

    @property
    def needs_group(self) -> bool:
        return True

    def __call__(self, scored: Scored) -> Advantages:
        centred, number, squares = less_group_mean(of_rollouts(scored), scored.groups)
        std = (squares / (number - 1).clamp(min=1)).sqrt()
        return Advantages((centred / (std + self.eps))[owners(scored)])
