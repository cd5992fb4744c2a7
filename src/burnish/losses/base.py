"""What a loss is: it says what it needs and reads, sums, and never divides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from burnish.component import Component

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.types import Block, Divergence, LossOutput, Ranking, RowKind, TokenOutputs


class Loss(Component):
    """A sum over tokens or documents of a block. The policy divides by `count`, summed over the whole global batch
    before the first backward, so the gradient is the same under any split into micro-batches, packing or ranks.

    A loss that is linear in the log-probabilities, with coefficients known before the forward pass, declares
    `needs = {"weighted_nll"}` and `coefficients`: the projection then returns one scalar and spends three matrix
    products, where log-probabilities and a backward pass would spend four.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logprobs"})
    """Names of `TokenOutputs` fields that the model must compute."""
    asks: ClassVar[frozenset[str]] = frozenset()
    """Columns of the block that no row holds and another pass must write: `ref_logprobs` [T] by the reference;
    `teacher_topk_ids` and `teacher_topk_logprobs` [T, K] and `teacher_hidden` [T, H'] by the teacher; `kto_kl` [D] by
    both policy and reference. See `Policy.annotated`."""
    trains: ClassVar[bool] = True
    """Whether it has a gradient; False: it measures, for a workflow's `evaluate`."""
    rows: ClassVar[RowKind] = "conversation"
    """What a row of the data must be. `conversation` losses read any kind, since all kinds have trained tokens."""

    def singles(self) -> Sequence[Loss]:
        """The losses that it adds up; itself, where it is none of several."""
        return [self]

    @property
    def divergence(self) -> Divergence | None:
        """Which divergence from the teacher `full_kl` is, for losses that need it."""
        return None

    def heads(self) -> Mapping[str, Literal["number", "numbers", "classes"]]:
        """Heads whose scores it reads -> what each must say: one `number`, any `numbers`, or a score for each of
        several `classes`."""
        return {}

    def labels(self) -> dict[str, str]:
        """Label columns that this loss reads -> the head whose outputs they are compared with."""
        return {}

    def reads(self, block: Block) -> Tensor:
        """bool [T]: the tokens whose outputs are read. The others are dropped before the projection."""
        return block.loss_mask

    def coefficients(self, block: Block) -> Tensor:
        """float32 [T]: the weight of each token's negative log-probability; asked only of `weighted_nll` losses."""
        raise AssertionError(f"{type(self).__name__} needs weighted_nll and must say its coefficients")

    def candidates(self, block: Block) -> Tensor:
        """int64 [K]: ids that `candidate_logits` are asked of; a pure function of the block."""
        raise AssertionError(f"{type(self).__name__} needs candidate_logits and must say of which ids")

    def ranking(self, block: Block) -> Ranking:
        """Which ids `ranks` sets each token against."""
        from burnish.types import Ranking

        return Ranking()

    def count(self, block: Block) -> Tensor:
        """Scalar: how many things (trained tokens, pairs) the sum is over; its global sum is the denominator. [n] where
        the total is [n]."""
        return block.loss_mask.sum()

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        raise AssertionError(f"{type(self).__name__} is not callable")


class Asking(Loss):
    """What a second model is asked when no loss is there to ask."""

    type: str = "asking"
    columns: frozenset[str]

    @property
    def asks(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.columns
