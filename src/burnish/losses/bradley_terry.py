"""Bradley-Terry: of two answers, the one that people chose gets the higher reward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge

from burnish.losses.base import Loss
from burnish.losses.pairs import pairs_in, split
from burnish.losses.reduce import at_last_tokens
from burnish.types import LossOutput, last_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.types import Block, RowKind, TokenOutputs


class BradleyTerry(Loss):
    """-log sigmoid(r_c - r_r - margin) + centering (r_c + r_r)^2, with r_c and r_r the rewards of a pair's chosen and
    rejected answers: what the head says at their last tokens. Counted by pair.

    Ouyang et al., arXiv:2203.02155, eq. 1; the margin, a column of the data that is 0 where a row has none: Touvron et
    al., arXiv:2307.09288, eq. 2; centering: Eisenstein et al., arXiv:2312.09244. Where every reward is 0 it is
    ln 2 = 0.6931. A document column `weight` multiplies its pair and leaves the count as it is.
    """

    type: Literal["bradley_terry"] = "bradley_terry"
    needs: ClassVar[frozenset[str]] = frozenset({"scores"})
    rows: ClassVar[RowKind] = "preference"
    centering: Annotated[float, Ge(0)] = 0.0
    """Pulls the two rewards of a pair towards a sum of 0; without it their level is free. 0.01 is usual."""
    head: str = "score"
    """Which of the model's heads says the reward."""

    def heads(self) -> dict[str, Literal["number", "classes"]]:
        return {self.head: "number"}

    def reads(self, block: Block) -> Tensor:
        return last_tokens(block)

    def count(self, block: Block) -> Tensor:
        return pairs_in(block).sum()

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        from torch.nn.functional import logsigmoid

        chosen, rejected = split(at_last_tokens(outputs.scores[self.head], block).squeeze(1), block)
        wanted, weight = split(block.columns["margin"], block)[0], split(block.columns["weight"], block)[0]
        margin = chosen - rejected
        loss = -logsigmoid(margin - wanted) + self.centering * (chosen + rejected).square()
        total, count = (loss * weight).sum(), pairs_in(block).sum()
        sums = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": margin,
            "rewards/accuracies": margin > 0,
        }
        metrics = {name: (values.detach().sum(), count) for name, values in sums.items()}
        return LossOutput(total, {"loss": (total.detach(), count), **metrics})
