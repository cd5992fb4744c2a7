"""Group sequence policy optimisation: one ratio a rollout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from annotated_types import Gt, Interval
from pydantic import model_validator

from burnish.component import unfit
from burnish.losses.reduce import by_document, to_tokens
from burnish.losses.rl.base import Sampled
from burnish.losses.rl.clipping import ClippedLoss
from burnish.losses.rl.kl import MAX_LOG_RATIO

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.types import Block


class GSPO(ClippedLoss):
    """max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high)) with s = (prod_t pi / pi_old)^(1 / n) of a rollout's n sampled
    tokens.

    Zheng et al., arXiv:2507.18071, eq. 5 and 7, in the form of eq. 13: the value of s at each token, with the gradient
    of that token's log-probability alone. With one advantage a rollout the two forms have the same gradient. s moves
    far less than a token's ratio, and its bounds are as much closer.
    """

    type: Literal["gspo"] = "gspo"
    aggregation: Literal["token", "sequence", "constant"] = "sequence"
    """`sequence`, the mean over rollouts: the ratio is a rollout's, and so is its weight."""
    clip_low: Annotated[float, Interval(gt=0, le=1)] = 3e-4
    """How far below 1 the ratio of a rollout of negative advantage has a gradient."""
    clip_high: Annotated[float, Gt(0)] = 4e-4
    """How far above 1 the ratio of a rollout of positive advantage has a gradient."""

    @model_validator(mode="after")
    def _by_sequence(self) -> Self:
        if self.aggregation != "sequence":
            reason = f"GSPO has one ratio a rollout, and `{self.aggregation}` would weigh it by the rollout's length"
            raise unfit(reason, "leave it at `sequence`, or use the loss ppo_clip", "aggregation")
        return self

    def log_ratio(self, sampled: Sampled, block: Block) -> Tensor:
        own = sampled.logprobs - sampled.old
        tokens_D = by_document(sampled.mask, block).clamp(min=1)
        mean_D = (by_document(own.detach(), block) / tokens_D).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return to_tokens(mean_D, block).to(own.dtype) + (own - own.detach())
