"""Pairs of a better and a worse answer in a block: their log-probabilities, and what every loss on them has in common.

A pair is a group with a document of `preference` 1 (chosen) and one of -1 (rejected), in any order; a prompt that both
share is a document of `preference` 0. Vectors here are float64 [D], one entry a group at the group's number, and 0 in
the entries that are no pair. Must not know any one loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from burnish.losses.base import Loss
from burnish.losses.reduce import by_document, by_group
from burnish.types import LossOutput

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.types import Block, RowKind, TokenOutputs


def pairs_in(block: Block) -> Tensor:
    """bool [D]: which group numbers are pairs."""
    preference_D = block.columns["preference"]
    return (by_group(preference_D > 0, block) > 0) & (by_group(preference_D < 0, block) > 0)


def split(vector_D: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """A value of each document as (chosen, rejected) of each pair.

    Two pairs, the first with a shared prompt, the second laid the other way round:

        vector_D     [ 7, 1, 2,  4, 3]
        preference   [ 0, 1,-1, -1, 1]
        group_ids    [ 0, 0, 0,  1, 1]   ->   chosen [1, 3, 0, 0, 0]    rejected [2, 4, 0, 0, 0]
    """
    preference_D, is_pair = block.columns["preference"], pairs_in(block)
    chosen, rejected = by_group(vector_D * (preference_D > 0), block), by_group(vector_D * (preference_D < 0), block)
    return chosen * is_pair, rejected * is_pair


@dataclass(slots=True, frozen=True)
class Pairs:
    """The pairs of a block under the policy and, where one was asked, under the reference."""

    is_pair: Tensor
    """bool: which entries are pairs."""
    chosen_logps: Tensor
    """log p of the chosen answer: the sum over its trained tokens."""
    rejected_logps: Tensor
    chosen_ref_logps: Tensor | None
    """The same under the reference, from the column `ref_logprobs`; None without that."""
    rejected_ref_logps: Tensor | None
    chosen_tokens: Tensor
    """Trained tokens of the chosen answer."""
    rejected_tokens: Tensor
    weight: Tensor
    """The row's weight, from the column `weight`; 1 without that."""

    @classmethod
    def of(cls, outputs: TokenOutputs, block: Block) -> Pairs:
        """The pairs of `block`, at whose trained tokens `outputs` has `logprobs`."""
        assert outputs.logprobs is not None
        trained_T, columns, is_pair = block.loss_mask, block.columns, pairs_in(block)
        chosen, rejected = split(by_document(outputs.logprobs * trained_T, block), block)
        chosen_tokens, rejected_tokens = split(by_document(trained_T, block), block)
        chosen_ref = rejected_ref = None
        if "ref_logprobs" in columns:
            chosen_ref, rejected_ref = split(by_document(columns["ref_logprobs"] * trained_T, block), block)
        return cls(
            is_pair=is_pair,
            chosen_logps=chosen,
            rejected_logps=rejected,
            chosen_ref_logps=chosen_ref,
            rejected_ref_logps=rejected_ref,
            chosen_tokens=chosen_tokens,
            rejected_tokens=rejected_tokens,
            weight=split(columns["weight"], block)[0] if "weight" in columns else 1.0 * is_pair,
        )

    def logps(self, *, mean: bool) -> tuple[Tensor, Tensor]:
        """log p of (chosen, rejected); with `mean` a token."""
        chosen, rejected = self.chosen_logps, self.rejected_logps
        return self._a_token(chosen, rejected) if mean else (chosen, rejected)

    def ratios(self, *, mean: bool) -> tuple[Tensor, Tensor]:
        """log p - log q of (chosen, rejected) under policy p and reference q; with `mean` a token."""
        assert self.chosen_ref_logps is not None and self.rejected_ref_logps is not None, "ref_logprobs are missing"
        chosen, rejected = self.chosen_logps - self.chosen_ref_logps, self.rejected_logps - self.rejected_ref_logps
        return self._a_token(chosen, rejected) if mean else (chosen, rejected)

    def _a_token(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        return chosen / self.chosen_tokens.clamp(min=1), rejected / self.rejected_tokens.clamp(min=1)

    def output(self, loss: Tensor, chosen_reward: Tensor, rejected_reward: Tensor, **also: Tensor) -> LossOutput:
        """A loss's sum over the pairs, each times its weight; the metrics of pairs, and `also` others."""
        total, count = (loss * self.weight).sum(), self.is_pair.sum()
        others = {name: (values.sum().detach(), count) for name, values in also.items()}
        metrics = pair_metrics(self, chosen_reward, rejected_reward)
        return LossOutput(total, {"loss": (total.detach(), count), **others, **metrics})


def pair_metrics(pairs: Pairs, chosen_reward: Tensor, rejected_reward: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """name -> (sum, count) over pairs, whatever their weights.

    Args:
        chosen_reward: what the loss compares, beta times a log-ratio for most; 0 where there is no pair.
        rejected_reward: the same of the rejected answer.
    """
    sums = {
        "rewards/chosen": chosen_reward,
        "rewards/rejected": rejected_reward,
        "rewards/margins": chosen_reward - rejected_reward,
        "rewards/accuracies": chosen_reward > rejected_reward,
        "logps/chosen": pairs.chosen_logps,
        "logps/rejected": pairs.rejected_logps,
    }
    count = pairs.is_pair.sum()
    return {name: (values.detach().sum(), count) for name, values in sums.items()}


class PairLoss(Loss):
    """A loss on pairs: the sum of each pair's `compare`, times its weight; counted by pair, with the metrics of pairs.

    Compares with a reference, by `Pairs.ratios`; one that does without, by `Pairs.logps`, says `asks = frozenset()`.
    """

    asks: ClassVar[frozenset[str]] = frozenset({"ref_logprobs"})
    rows: ClassVar[RowKind] = "preference"

    def compare(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """[D] each: the loss, then the rewards of the chosen and the rejected answer, which are for the metrics. Where
        there is no pair the rewards are 0, and the loss is not looked at."""
        raise AssertionError(f"{type(self).__name__} must say how it compares the answers of a pair")

    def count(self, block: Block) -> Tensor:
        return pairs_in(block).sum()

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        pairs = Pairs.of(outputs, block)
        return pairs.output(*self.compare(pairs))
