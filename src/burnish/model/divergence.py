"""How far two language models are apart, token by token, from their hidden states and heads.

Both models' logits of a chunk of tokens are made, compared and dropped; the backward pass makes them again where the
policy's head trains. Gradients flow into the policy alone. This module must not know which loss reads the divergence,
nor where the second model is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from burnish.errors import ModelError
from burnish.model.head_chunks import Head, HeadGradients, wide_dtype
from burnish.model.vocabulary_shard import VocabularyShard
from burnish.types import Divergence

BUFFERS = 3
"""Tensors [c, V] at work at once: log p, log q, and one to compute in. Chunks are shorter by as much, so that a
divergence takes no more memory than log-probabilities do."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A second model's distribution over the same vocabulary, as hidden states and head; constant to the gradient.

    Its hidden size may be another, and its head may have more rows: ids from the policy's vocabulary size on are
    padding and stand outside of its softmax too.
    """

    hidden_TH: Tensor
    """[T, H'] of the same block: the state, after the final norm, that token t is drawn from; that is `hidden_states`
    of its own forward pass."""
    weight_VH: Tensor
    divergence: Divergence
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0


def divergence_rows(
    hidden_nH: Tensor, weight: Tensor, bias: Tensor | None, head: Head, reference: Reference, read_n: Tensor
) -> Tensor:
    """[n]: the reference's divergence at each row, differentiable in hidden states, weight and bias.

    Its own temperature takes the place of the head's: log-probabilities made beside it keep theirs.

    Args:
        read_n: index in the block of the token that each row predicts.
    """
    assert reference.weight_VH.shape[0] >= head.vocab_size, "the second model has fewer tokens than the policy"
    if head.shard.group is not None and reference.weight_VH.shape[0] != weight.shape[0]:
        raise ModelError(
            f"the policy's head has {weight.shape[0]:,} rows on each rank and the second model's "
            f"{reference.weight_VH.shape[0]:,}: a rank's rows would stand for different tokens",
            where="mesh.tp",
            cure="a `model.pad_vocab_to` that makes both equally long (512 for Qwen's 151,936 and 152,064 rows)",
        )
    temperature, chunk = reference.divergence.temperature, max(1, head.chunk // BUFFERS)
    policy = replace(head, temperature=temperature, chunk=chunk)
    second = Head(head.vocab_size, reference.softcap, reference.logit_scale, temperature, chunk, head.shard)
    second_hidden_nH = reference.hidden_TH.detach().index_select(0, read_n)
    compared = _Compared(reference, second_hidden_nH, policy, second)
    return _Divergence.apply(hidden_nH, weight, bias, compared, torch.is_grad_enabled())  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, slots=True)
class _Compared:
    """What is constant in one comparison: the reference at the rows that are read, and both heads."""

    reference: Reference
    hidden_nH: Tensor
    policy: Head
    second: Head

    def chunks(
        self, hidden_nH: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor | float]]:
        """For each chunk: its rows, both models' logits and scratch memory, all [c, V] and free to be overwritten, and
        d logits / d (h W^T + b) of the policy's."""
        memory, of = self.policy.buffer(hidden_nH, BUFFERS), self.reference
        for rows in self.policy.slices(hidden_nH.shape[0]):
            z_p, z_q, scratch = memory[:, : rows.stop - rows.start]
            _, slope = self.policy.logits(hidden_nH[rows], weight, bias, z_p)
            self.second.logits(self.hidden_nH[rows], of.weight_VH, of.bias, z_q)
            yield rows, z_p, z_q, scratch, self.policy.slope if slope is None else slope


class _Divergence(torch.autograd.Function):
    """D_n between p = softmax(z) and q of the reference. With r the log-ratio, and m = beta q + (1 - beta) p:

        forward   D = sum q (log q - log p)                                     dD/dz = p - q
        reverse   D = sum p r,                        r = log p - log q         dD/dz = p (r - D)
        jsd       D = beta KL(q || m) + (1 - beta) KL(p || m)
                    = H(m) - beta H(q) - (1 - beta) H(p)
                                                      r = log p - log m         dD/dz = (1 - beta) p (r - sum p r)

    The last: m moves with p, but sum m = 1 makes m's own share of the derivative a constant, which p's softmax drops.

    Row n of dH is the incoming gradient's entry n times what is known in the forward pass. So under a frozen head, as
    beside most adapters, it is made there, and no logits are made again: three products, not five.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_nH: Tensor, weight: Tensor, bias: Tensor | None, compared: _Compared, grad_enabled: bool
    ) -> Tensor:
        num_tokens = hidden_nH.shape[0]
        divergence_n = hidden_nH.new_zeros(num_tokens, dtype=wide_dtype(hidden_nH))
        log_sums_n2 = divergence_n.new_zeros(num_tokens, 2)
        ctx.frozen_head = not any(ctx.needs_input_grad[1:3])
        made_here = grad_enabled and ctx.frozen_head
        gradients = HeadGradients(hidden_nH, weight, bias, (made_here, False, False))
        for rows, log_p, log_q, scratch, slope in compared.chunks(hidden_nH, weight, bias):
            log_sums_n2[rows, :1] = _normalise(log_p, scratch, compared.policy.shard)
            log_sums_n2[rows, 1:] = _normalise(log_q, scratch, compared.policy.shard)
            divergence_n[rows], grad = _compare(compared, log_p, log_q, scratch)
            if made_here:
                gradients.add(rows, hidden_nH[rows], weight, slope, grad)
        ctx.compared = compared
        if ctx.frozen_head:
            ctx.save_for_backward(gradients.hidden)
        else:
            ctx.save_for_backward(hidden_nH, weight, bias, log_sums_n2)
        return divergence_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_n: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.frozen_head:
            (unit_nH,) = ctx.saved_tensors
            return (unit_nH * grad_n[:, None]).to(unit_nH.dtype), None, None, None, None
        hidden_nH, weight, bias, log_sums_n2 = ctx.saved_tensors
        compared: _Compared = ctx.compared
        gradients = HeadGradients(hidden_nH, weight, bias, ctx.needs_input_grad[:3])
        for rows, log_p, log_q, scratch, slope in compared.chunks(hidden_nH, weight, bias):
            log_p.sub_(log_sums_n2[rows, :1])
            log_q.sub_(log_sums_n2[rows, 1:])
            _, grad = _compare(compared, log_p, log_q, scratch)
            gradients.add(rows, hidden_nH[rows], weight, slope, grad.mul_(grad_n[rows, None]))
        return *gradients.result(weight, bias), None, None


def _normalise(z: Tensor, scratch: Tensor, shard: VocabularyShard) -> Tensor:
    """Makes logits [c, V] log-probabilities in place; [c, 1] is what was taken off."""
    log_sums_c1 = shard.max(z)
    (sums_c1,) = shard.sum(torch.sub(z, log_sums_c1, out=scratch).exp_().sum(1, keepdim=True))
    log_sums_c1 += sums_c1.log_()
    z.sub_(log_sums_c1)
    return log_sums_c1


def _compare(compared: _Compared, log_p: Tensor, log_q: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence [c] and its derivative by the policy's logits [c, V], which lies in one of the three tensors.

    All three are spent, and no fourth is made: products are written somewhere before they are summed, where `vecdot`
    would hold one of its own.
    """
    of, shard = compared.reference.divergence, compared.policy.shard
    if of.kind == "forward":
        ratio = torch.sub(log_q, log_p, out=scratch)
        q = log_q.exp_()
        return shard.sum(ratio.mul_(q).sum(1))[0], log_p.exp_().sub_(q)
    if of.kind == "reverse":
        p, ratio = torch.exp(log_p, out=scratch), log_p.sub_(log_q)
        (value_c1,) = shard.sum(torch.mul(p, ratio, out=log_q).sum(1, keepdim=True))
        return value_c1.squeeze(1), p.mul_(ratio.sub_(value_c1))
    minus_entropy_of_p = torch.exp(log_p, out=scratch).mul_(log_p).sum(1)
    q = torch.exp(log_q, out=scratch)
    minus_entropy_of_q = log_q.mul_(q).sum(1)
    m = q.mul_(of.beta).add_(torch.exp(log_p, out=log_q), alpha=1 - of.beta)
    entropy_of_m = torch.special.entr(m, out=log_q).sum(1)  # -m log m, and 0 where m underflows to 0
    p = torch.exp(log_p, out=log_q)
    # Where m underflows so does p, and 0 * (log p - log m) must be 0, not 0 * inf.
    ratio = log_p.sub_(m.clamp_(min=torch.finfo(m.dtype).tiny).log_())
    mean_c1 = torch.mul(p, ratio, out=m).sum(1, keepdim=True)
    value = entropy_of_m.add_(minus_entropy_of_q, alpha=of.beta).add_(minus_entropy_of_p, alpha=1 - of.beta)
    value, mean_c1 = shard.sum(value, mean_c1)
    return value, p.mul_(ratio.sub_(mean_c1)).mul_(1 - of.beta)
