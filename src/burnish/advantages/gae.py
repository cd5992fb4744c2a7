"""Generalised advantage estimation: what a value head did not expect."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from burnish.advantages.arithmetic import discounted, of_tokens, whitened
from burnish.advantages.base import Advantage, Advantages, Scored


class GAE(Advantage):
    """A_t = delta_t + gamma lam A_(t + 1), with delta_t = r_t + gamma V_(t + 1) - V_t and V = 0 behind the last token;
    r_t is minus the penalty of token t, and at a rollout's last token its reward.

    Schulman et al., arXiv:1506.02438, eq. 16. The returns that the value head learns are A + V, before whitening. What
    stands between the turns of a rollout is passed over: the next sampled token follows the last one.
    """

    type: Literal["gae"] = "gae"
    gamma: Annotated[float, Interval(ge=0, le=1)] = 1.0
    """Discount of a token's reward for each token before it."""
    lam: Annotated[float, Interval(ge=0, le=1)] = 0.95
    """1: returns less values, without bias; 0: one step ahead, with the least spread."""
    whiten: bool = True
    """Subtract the advantages' mean over all tokens of the step and divide by their standard deviation."""

    @property
    def needs_values(self) -> bool:
        return True

    def __call__(self, scored: Scored) -> Advantages:
        assert scored.values is not None, "gae without values"
        values, rewards = scored.values.double(), of_tokens(scored, scored.rewards.double())
        following = values.new_zeros(len(values))
        following[:-1] = values[1:]
        following[scored.lengths.cumsum(0)[scored.lengths > 0] - 1] = 0.0
        deltas = rewards + self.gamma * following - values
        advantages = discounted(deltas, scored.lengths, self.gamma * self.lam)
        return Advantages(whitened(advantages) if self.whiten else advantages, advantages + values)
