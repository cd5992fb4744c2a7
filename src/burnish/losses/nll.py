"""Negative log-likelihood of the trained tokens: supervised fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from burnish.losses.base import Loss
from burnish.types import LossOutput

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.types import Block, TokenOutputs


class NLL(Loss):
    """-log p(token | before), summed over the trained tokens and counted by token: cross-entropy with a token mean.

    Two documents of 10 and 1 trained tokens weigh 10 : 1, however they are packed. A document column `weight`, where
    the data has one, multiplies its tokens and leaves the count as it is.
    """

    type: Literal["nll"] = "nll"
    needs: ClassVar[frozenset[str]] = frozenset({"weighted_nll"})

    def coefficients(self, block: Block) -> Tensor:
        trained = block.loss_mask.float()
        if "weight" not in block.columns:
            return trained
        return trained * block.columns["weight"].float()[block.document_ids.clamp(min=0)]

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        total = outputs.weighted_nll
        assert total is not None
        return LossOutput(total, {"loss": (total.detach(), self.count(block))})
