"""Classification: one of several classes for each document."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from burnish.losses.labelled import LabelledLoss
from burnish.losses.reduce import at_last_tokens, labelled
from burnish.types import LossOutput

if TYPE_CHECKING:
    from burnish.types import Block, TokenOutputs


class Classification(LabelledLoss):
    """Cross-entropy, -log softmax(s)_y, for each document that has a class y, with s the scores at its last token.

    Counted by document. A document column `weight` multiplies its document and leaves the count as it is.
    """

    type: Literal["classification"] = "classification"

    def heads(self) -> dict[str, Literal["number", "classes"]]:
        return {self.head: "classes"}

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        from torch.nn.functional import cross_entropy

        labelled_D = labelled(block, self.label)
        scores_DL = at_last_tokens(outputs.scores[self.head], block)
        class_D = block.columns[self.label].masked_fill(~labelled_D, 0.0).long()
        weight_D = block.columns["weight"] * labelled_D
        total = (cross_entropy(scores_DL, class_D, reduction="none") * weight_D).sum()
        right, count = ((scores_DL.argmax(1) == class_D) & labelled_D).sum(), labelled_D.sum()
        return LossOutput(total, {"loss": (total.detach(), count), "accuracy": (right, count)})
