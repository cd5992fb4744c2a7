"""Classification: one of several classes for each document."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from burnish.losses.base import Loss
from burnish.losses.reduce import at_last_tokens, labelled
from burnish.types import LossOutput, last_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.types import Block, RowKind, TokenOutputs


class Classification(Loss):
    """Cross-entropy, -log softmax(s)_y, for each document that has a class y, with s the scores at its last token.

    Counted by document. A document column `weight` multiplies its document and leaves the count as it is.
    """

    type: Literal["classification"] = "classification"
    needs: ClassVar[frozenset[str]] = frozenset({"scores"})
    rows: ClassVar[RowKind] = "labelled"
    label: str = "label"
    """Column of the data with the class, by name or number; a row without one trains nothing here."""
    head: str = "score"
    """Which of the model's heads scores the classes."""

    def heads(self) -> dict[str, Literal["number", "classes"]]:
        return {self.head: "classes"}

    def labels(self) -> dict[str, str]:
        return {self.label: self.head}

    def reads(self, block: Block) -> Tensor:
        return last_tokens(block)

    def count(self, block: Block) -> Tensor:
        return labelled(block, self.label).sum()

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        from torch.nn.functional import cross_entropy

        labelled_D = labelled(block, self.label)
        scores_DL = at_last_tokens(outputs.scores[self.head], block)
        class_D = block.columns[self.label].masked_fill(~labelled_D, 0.0).long()
        weight_D = block.columns["weight"] * labelled_D
        total = (cross_entropy(scores_DL, class_D, reduction="none") * weight_D).sum()
        right, count = ((scores_DL.argmax(1) == class_D) & labelled_D).sum(), labelled_D.sum()
        return LossOutput(total, {"loss": (total.detach(), count), "accuracy": (right, count)})
