"""Hinge loss on preferences: a pair that is ahead of the reference by a margin teaches nothing more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt

from burnish.losses.pairs import PairLoss, Pairs

if TYPE_CHECKING:
    from torch import Tensor


class Hinge(PairLoss):
    """max(0, 1 - m), with m = beta ((log p_c - log q_c) - (log p_r - log q_r)) of a pair's chosen and rejected answers
    under policy p and reference q. Counted by pair.

    Liu et al. (RSO), arXiv:2309.06657, the loss "hinge-norm": that of SLiC (Zhao et al., arXiv:2305.10425) relative
    to a reference. Where the policy equals the reference it is 1.
    """

    type: Literal["hinge"] = "hinge"
    beta: Annotated[float, Gt(0)] = 0.1
    """Reciprocal of the margin: a pair is done when the answers' log-ratios are 1 / beta nats apart."""

    def compare(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected = pairs.ratios(mean=False)
        loss = (1 - self.beta * (chosen - rejected)).relu()
        return loss, self.beta * chosen, self.beta * rejected
