"""Discounted returns, normalised over the whole step: REINFORCE++."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from burnish.advantages.arithmetic import discounted, less_group_mean, of_tokens, whitened
from burnish.advantages.base import Advantage, Advantages, Scored


class ReinforcePP(Advantage):
    """R_t = sum over k >= t of gamma^(k - t) r_k, whitened over all sampled tokens of the step, with r_k minus the
    penalty of token k, and at a rollout's last token its reward.

    Hu et al., arXiv:2501.03262. Returns are carried over what stands between the turns of a rollout. With
    `gamma: 0`, `whiten: false` and rewards of 0, a token's advantage is minus its own penalty: with the penalty's
    reference a teacher this is on-policy distillation.
    """

    type: Literal["reinforce_pp"] = "reinforce_pp"
    gamma: Annotated[float, Interval(ge=0, le=1)] = 1.0
    """Discount of a token's reward for each token before it."""
    baseline: Literal["none", "group"] = "none"
    """`group`: rewards less the mean of their prompt's rollouts (REINFORCE++-baseline); penalties stay as they are."""
    whiten: bool = True
    """Subtract the mean over all tokens and divide by their standard deviation."""

    @property
    def needs_group(self) -> bool:
        return self.baseline == "group"

    def __call__(self, scored: Scored) -> Advantages:
        rewards = scored.rewards.double()
        if self.baseline == "group":
            rewards, _, _ = less_group_mean(rewards, scored.groups)
        returns = discounted(of_tokens(scored, rewards), scored.lengths, self.gamma)
        return Advantages(whitened(returns) if self.whiten else returns)
