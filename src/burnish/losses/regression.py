"""Regression: a number for each document."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt

from burnish.losses.labelled import LabelledLoss
from burnish.losses.reduce import at_last_tokens, labelled
from burnish.types import LossOutput

if TYPE_CHECKING:
    from burnish.types import Block, TokenOutputs


class Regression(LabelledLoss):
    """(s - y)^2 for each document that has a label y, with s what the head says at its last token. Counted by document.

    With `huber_delta` d: e^2 / 2 where |e| = |s - y| <= d, else d (|e| - d / 2); Huber, Annals of Mathematical
    Statistics 35 (1964). A document column `weight` multiplies its document and leaves the count as it is.
    """

    type: Literal["regression"] = "regression"

    huber_delta: Annotated[float, Gt(0)] | None = None
    """Present: errors beyond it count linearly, so that a few wild labels do not rule."""

    def heads(self) -> dict[str, Literal["number", "classes"]]:
        return {self.head: "number"}

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        import torch
        from torch.nn.functional import huber_loss

        labelled_D = labelled(block, self.label)
        score_D = at_last_tokens(outputs.scores[self.head], block).squeeze(1)
        label_D = block.columns[self.label].masked_fill(~labelled_D, 0.0)
        error_D = (score_D - label_D) * labelled_D
        if self.huber_delta is None:
            loss_D = error_D.square()
        else:
            loss_D = huber_loss(error_D, torch.zeros_like(error_D), "none", self.huber_delta)
        total, count = (loss_D * block.columns["weight"]).sum(), labelled_D.sum()
        metrics = {"loss": (total.detach(), count), "absolute_error": (error_D.detach().abs().sum(), count)}
        return LossOutput(total, metrics)
