"""Distillation of a teacher's likeliest tokens, as a cache keeps them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from burnish.losses.base import Loss
from burnish.losses.reduce import trained_weight
from burnish.types import LossOutput

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.types import Block, TokenOutputs

SMALLEST_TAIL = 1e-6
"""A logit near 16 is a multiple of 2e-6 in float32, so 1 - sum(exp(log-probabilities)) is off by about as much: what is
left for all other tokens together, if it is less than this, is rounding."""


class TopKKD(Loss):
    """KL divergence between teacher and student over K + 1 categories: the teacher's K likeliest tokens, and all others
    together; summed over the trained tokens and counted by token.

    With q_k, p_k the probabilities under teacher and student, and q_tail = 1 - sum q_k, p_tail = 1 - sum p_k:
    forward = sum q_k log(q_k / p_k) + q_tail log(q_tail / p_tail). Merging categories never raises a divergence, so it
    is a lower bound of `kd`, and equals it where K is the whole vocabulary. Without the tail the student would be free
    to put any mass on tokens that the teacher finds unlikely.

    There is no temperature: the mass of the other tokens at another one cannot be known from K log-probabilities.
    """

    type: Literal["topk_kd"] = "topk_kd"
    needs: ClassVar[frozenset[str]] = frozenset({"topk_logprobs"})
    asks: ClassVar[frozenset[str]] = frozenset({"teacher_topk_ids", "teacher_topk_logprobs"})
    kind: Literal["forward", "reverse"] = "forward"
    """`forward`: KL(teacher || student); `reverse`: KL(student || teacher)."""

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        import torch

        assert outputs.topk_logprobs is not None
        student, teacher = _with_tail(outputs.topk_logprobs), _with_tail(block.columns["teacher_topk_logprobs"])
        first, second = (teacher, student) if self.kind == "forward" else (student, teacher)
        divergence_T = (first.exp() * (first - second)).sum(1)
        # A token that is not read has K log-probabilities of 0: far from a distribution, and finite.
        total, count = (divergence_T * trained_weight(block)).sum(), self.count(block)
        with torch.no_grad():
            tail = (teacher[:, -1].exp() * block.loss_mask).sum()
        return LossOutput(total, {"loss": (total.detach(), count), "teacher_tail": (tail, count)})


def _with_tail(topk_logprobs_TK: Tensor) -> Tensor:
    """[T, K + 1]: the log-probability of all other tokens beside those of the K."""
    import torch

    # A mass near 1 is taken from 1 without an error of its own, so log1p would be no more exact.
    tail_T1 = 1 - topk_logprobs_TK.exp().sum(1, keepdim=True)
    return torch.cat([topk_logprobs_TK, tail_T1.clamp(min=SMALLEST_TAIL).log()], 1)
