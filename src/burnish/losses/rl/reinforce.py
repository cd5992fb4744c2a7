"""The plain policy gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from burnish.losses.rl.base import PolicyLoss, Sampled, Term

if TYPE_CHECKING:
    from burnish.types import Block


class Reinforce(PolicyLoss):
    """-sg(rho) A log pi, with rho = pi / pi_old of each token where `importance_weights` is on, else 1, and no gradient
    through sg (Williams, "Simple statistical gradient-following algorithms", 1992).

    Nothing bounds the weights: for more than one update on the same rollouts use `cispo` or `ppo_clip`.
    """

    type: Literal["reinforce"] = "reinforce"
    importance_weights: bool = False
    """Weigh by the ratio, so that the gradient is that of the present policy."""

    def surrogate(self, sampled: Sampled, block: Block) -> Term:
        ratio = sampled.ratio.detach()
        loss = -sampled.advantages * sampled.logprobs
        return Term(loss * ratio if self.importance_weights else loss, {"ratio": ratio})
