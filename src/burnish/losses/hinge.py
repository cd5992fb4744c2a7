"""Hinge loss on preferences: a pair that is ahead of the reference by a margin teaches nothing more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Gt

from burnish.losses.base import Loss
from burnish.losses.pairs import Pairs

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.types import Block, LossOutput, RowKind, TokenOutputs


class Hinge(Loss):
    """max(0, 1 - m), with m = beta ((log p_c - log q_c) - (log p_r - log q_r)) of a pair's chosen and rejected answers
    under policy p and reference q. Counted by pair.

    Liu et al. (RSO), arXiv:2309.06657, the loss "hinge-norm": that of SLiC (Zhao et al., arXiv:2305.10425) relative
    to a reference. Where the policy equals the reference it is 1.
    """

    type: Literal["hinge"] = "hinge"
    asks: ClassVar[frozenset[str]] = frozenset({"ref_logprobs"})
    rows: ClassVar[RowKind] = "preference"
    beta: Annotated[float, Gt(0)] = 0.1
    """Reciprocal of the margin: a pair is done when the answers' log-ratios are 1 / beta nats apart."""

    def count(self, block: Block) -> Tensor:
        return Pairs.count(block)

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        pairs = Pairs.of(outputs, block)
        chosen, rejected = pairs.ratios(mean=False)
        loss = (1 - self.beta * (chosen - rejected)).relu()
        return pairs.output(loss, self.beta * chosen, self.beta * rejected)
