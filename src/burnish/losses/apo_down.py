"""Anchored preference optimisation, down: both answers become less likely, the rejected one by more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt

from burnish.losses.pairs import PairLoss, Pairs

if TYPE_CHECKING:
    from torch import Tensor


class APODown(PairLoss):
    """sigmoid(r_c) + 1 - sigmoid(r_c - r_r), with r = beta (log p - log q) of a pair's chosen and rejected answers
    under policy p and reference q. For chosen answers that are worse than what the model says by itself.

    D'Oosterlinck et al., arXiv:2408.06266, eq. 8, plus 1, so that it falls to 0. Where the policy equals the reference
    it is 1. Counted by pair.
    """

    type: Literal["apo_down"] = "apo_down"
    beta: Annotated[float, Gt(0)] = 0.1
    """How closely the policy is held to the reference; larger is closer."""

    def compare(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected = pairs.ratios(mean=False)
        loss = (self.beta * chosen).sigmoid() + 1 - (self.beta * (chosen - rejected)).sigmoid()
        return loss, self.beta * chosen, self.beta * rejected
