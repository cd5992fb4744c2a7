"""Anchored preference optimisation, zero: chosen answers become likelier than under the reference, rejected less."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt

from burnish.losses.pairs import PairLoss, Pairs

if TYPE_CHECKING:
    from torch import Tensor


class APOZero(PairLoss):
    """1 - sigmoid(r_c) + sigmoid(r_r), with r = beta (log p - log q) of a pair's chosen and rejected answers under
    policy p and reference q. For chosen answers that are better than what the model says by itself.

    D'Oosterlinck et al., arXiv:2408.06266, eq. 7, plus 1, so that it falls to 0. Where the policy equals the reference
    it is 1. Counted by pair.
    """

    type: Literal["apo_zero"] = "apo_zero"
    beta: Annotated[float, Gt(0)] = 0.1
    """How closely the policy is held to the reference; larger is closer."""

    def compare(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected = pairs.ratios(mean=False)
        loss = 1 - (self.beta * chosen).sigmoid() + (self.beta * rejected).sigmoid()
        return loss, self.beta * chosen, self.beta * rejected
