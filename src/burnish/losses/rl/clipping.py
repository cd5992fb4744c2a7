"""The clipped surrogate of proximal policy optimisation, for ratios of tokens or of sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt, Interval

from burnish.losses.rl.base import PolicyLoss, Sampled, Term

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.types import Block


class ClippedLoss(PolicyLoss):
    """max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)) (Schulman et al., arXiv:1707.06347, eq. 7), and not more
    than -A dual_clip where A < 0. `clip_fraction_low` and `clip_fraction_high` are the shares of sampled tokens that
    have no gradient, since they already are rarer, or likelier, than that."""

    clip_low: Annotated[float, Interval(gt=0, le=1)] = 0.2
    """How far below 1 the ratio of a token of negative advantage has a gradient."""
    clip_high: Annotated[float, Gt(0)] = 0.2
    """How far above 1 the ratio of a token of positive advantage has a gradient."""
    dual_clip: Annotated[float, Gt(1)] | None = None
    """Largest ratio that a negative advantage is multiplied with (Ye et al., arXiv:1912.09729), 3 is usual; a
    token beyond it has no gradient. Absent: there is none."""

    def log_ratio(self, sampled: Sampled, block: Block) -> Tensor:
        """[T] log of what is clipped."""
        return sampled.log_ratio

    def surrogate(self, sampled: Sampled, block: Block) -> Term:
        ratio, advantages = self.log_ratio(sampled, block).exp(), sampled.advantages
        low, high = 1 - self.clip_low, 1 + self.clip_high
        loss = (-advantages * ratio).maximum(-advantages * ratio.clamp(low, high))
        negative = advantages < 0
        metrics = {
            "ratio": ratio,
            "clip_fraction_low": (ratio < low) & negative,
            "clip_fraction_high": (ratio > high) & (advantages > 0),
        }
        if self.dual_clip is not None:
            metrics["clip_fraction_dual"] = (ratio > self.dual_clip) & negative
            loss = loss.minimum(-advantages * self.dual_clip).where(negative, loss)
        return Term(loss, metrics)
