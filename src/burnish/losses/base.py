"""What a loss is: it says what it needs and reads, sums, and never divides."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from burnish.component import Component

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.types import Block, LossOutput, TokenOutputs


class Loss(Component):
    """A sum over tokens or documents of a block. The policy divides by `count`, summed over the whole global batch
    before the first backward, so the gradient is the same under any split into micro-batches, packing or ranks.

    A loss that is linear in the log-probabilities, with coefficients known before the forward pass, declares
    `needs = {"weighted_nll"}` and `coefficients`: the projection then returns one scalar and spends three matrix
    products, where log-probabilities and a backward pass would spend four.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logprobs"})
    """Names of `TokenOutputs` fields that the projection must compute."""

    def reads(self, block: Block) -> Tensor:
        """bool [T]: the tokens whose outputs are read. The others are dropped before the projection."""
        return block.loss_mask

    def coefficients(self, block: Block) -> Tensor:
        """float32 [T]: the weight of each token's negative log-probability; asked only of `weighted_nll` losses."""
        raise AssertionError(f"{type(self).__name__} needs weighted_nll and must say its coefficients")

    def count(self, block: Block) -> Tensor:
        """Scalar: how many things (trained tokens, pairs) the sum is over; its global sum is the denominator."""
        return block.loss_mask.sum()

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        raise AssertionError(f"{type(self).__name__} is not callable")
