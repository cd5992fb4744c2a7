"""Negative log-likelihood of the trained tokens: supervised fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from burnish.losses.base import Loss
from burnish.losses.reduce import to_tokens, trained_weight
from burnish.types import LossOutput

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.types import Block, TokenOutputs


class NLL(Loss):
    """-log p(token | before), summed over the trained tokens and counted by token: cross-entropy with a token mean.

    Two documents of 10 and 1 trained tokens weigh 10 : 1, however they are packed. A document column `weight`, where
    the data has one, multiplies its tokens and leaves the count as it is. Of preference data, which has a column
    `preference`, only chosen answers are trained and counted.
    """

    type: Literal["nll"] = "nll"
    needs: ClassVar[frozenset[str]] = frozenset({"weighted_nll"})

    def reads(self, block: Block) -> Tensor:
        if "preference" not in block.columns:
            return block.loss_mask
        return block.loss_mask & to_tokens(block.columns["preference"] > 0, block)

    def count(self, block: Block) -> Tensor:
        return self.reads(block).sum()

    def coefficients(self, block: Block) -> Tensor:
        return trained_weight(block) * self.reads(block)

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        total = outputs.weighted_nll
        assert total is not None
        return LossOutput(total, {"loss": (total.detach(), self.count(block))})
