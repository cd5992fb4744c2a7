"""Process rewards: which steps of a solution are right."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from burnish.losses.base import Loss
from burnish.losses.reduce import to_tokens
from burnish.types import LossOutput

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.types import Block, RowKind, TokenOutputs


class Process(Loss):
    """-y log sigmoid(s) - (1 - y) log(1 - sigmoid(s)) for each step of a solution, with s what the head says at the
    step's last token and y in [0, 1] whether the step is right. Counted by step.

    Lightman et al., arXiv:2305.20050; Wang et al., arXiv:2312.08935, eq. 2. Where every score is 0 it is
    ln 2 = 0.6931. A document column `weight` multiplies its steps and leaves the count as it is.
    """

    type: Literal["process"] = "process"
    needs: ClassVar[frozenset[str]] = frozenset({"scores"})
    rows: ClassVar[RowKind] = "stepwise"
    head: str = "score"
    """Which of the model's heads grades the steps."""

    def heads(self) -> dict[str, Literal["number", "classes"]]:
        return {self.head: "number"}

    def reads(self, block: Block) -> Tensor:
        return block.loss_mask & ~block.columns["label"].isnan()  # NaN: no step ends there

    def count(self, block: Block) -> Tensor:
        return self.reads(block).sum()

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        from torch.nn.functional import binary_cross_entropy_with_logits

        ends_T = self.reads(block)
        score_T = outputs.scores[self.head].squeeze(1)
        label_T = block.columns["label"].masked_fill(~ends_T, 0.0)
        weight_T = to_tokens(block.columns["weight"], block) * ends_T
        total = (binary_cross_entropy_with_logits(score_T, label_T, reduction="none") * weight_T).sum()
        right = ((score_T > 0) == (label_T > 0.5)) & ends_T
        return LossOutput(total, {"loss": (total.detach(), ends_T.sum()), "accuracy": (right.sum(), ends_T.sum())})
