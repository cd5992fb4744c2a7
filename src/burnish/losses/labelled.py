"""What losses on labelled documents share: which column, which head, and where the head is read. Knows no formula."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from burnish.losses.base import Loss
from burnish.losses.reduce import labelled
from burnish.types import last_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.types import Block, RowKind


class LabelledLoss(Loss):
    """A loss of what a head says at the last token of each document that has a label. Counted by labelled document."""

    needs: ClassVar[frozenset[str]] = frozenset({"scores"})
    rows: ClassVar[RowKind] = "labelled"
    label: str = "label"
    """Column of the data with the label; a row without one trains nothing here."""
    head: str = "score"
    """Which of the model's heads is compared with it."""

    def labels(self) -> dict[str, str]:
        return {self.label: self.head}

    def reads(self, block: Block) -> Tensor:
        return last_tokens(block)

    def count(self, block: Block) -> Tensor:
        return labelled(block, self.label).sum()
