"""From hidden states to what a loss reads, without ever holding the logits of a block.

The vocabulary is the widest thing in training: 1,024 tokens x 151,936 words x 4 bytes are 0.6 GB of logits, and plain
cross-entropy holds three such tensors. So the tokens that no loss reads are dropped first, and the rest go through the
head `chunk` tokens at a time. Two ways:

    weighted_nll   the loss is linear in the log-probabilities: its gradient is known in the forward pass. Three matrix
                   products (logits, dH, dW) and one chunk of logits.
    [T] vectors    any loss arithmetic may follow: the backward pass makes each chunk's logits again. Four products.

This module must not know which loss reads its outputs, nor where the hidden states come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from burnish.model.head_chunks import Head, HeadGradients, wide_dtype
from burnish.types import TokenOutputs

if TYPE_CHECKING:
    from burnish.types import Block

VECTORS = frozenset({"logprobs", "entropy", "topk_logprobs", "full_kl"})
"""The `needs` that are differentiable [T] vectors made here (`values` come from a value head instead)."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A second model's distribution over the same vocabulary, as hidden states and head; constant to the gradient.

    With p the policy's distribution at a token and q the reference's, both at the same temperature, `full_kl` is
    `forward`: KL(q || p), the mode-covering divergence of distillation; `reverse`: KL(p || q), the penalty of RLHF.
    """

    hidden_TH: Tensor
    weight_VH: Tensor
    kind: Literal["forward", "reverse"]
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0


class _WeightedNLL(torch.autograd.Function):
    """sum_n coefficient_n * -log p(id_n | hidden_n), with its gradients computed on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_nH: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids_n: Tensor,
        coefficients_n: Tensor,
        head: Head,
        grad_enabled: bool,
    ) -> Tensor:
        wanted = tuple(grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        gradients = HeadGradients(hidden_nH, weight, bias, wanted)  # pyright: ignore[reportArgumentType]
        total = torch.zeros((), dtype=wide_dtype(hidden_nH), device=hidden_nH.device)
        memory = head.buffer(hidden_nH, 1)[0]
        for rows in head.slices(hidden_nH.shape[0]):
            hidden_cH, ids_c1 = hidden_nH[rows], ids_n[rows, None]
            coefficients_c1 = coefficients_n[rows, None].to(total.dtype)
            z, slope = head.logits(hidden_cH, weight, bias, memory)
            z.sub_(z.amax(1, keepdim=True))
            chosen_c1 = z.gather(1, ids_c1)
            sums_c1 = z.exp_().sum(1, keepdim=True)
            total += (coefficients_c1 * (sums_c1.log() - chosen_c1)).sum()
            if any(wanted):
                z.mul_(coefficients_c1 / sums_c1).scatter_add_(1, ids_c1, -coefficients_c1)
                gradients.add(rows, hidden_cH, weight, head.slope if slope is None else slope, z)
        ctx.gradients = gradients.result(weight, bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert ctx.gradients is not None, "weighted_nll: a second backward pass through the same graph"
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place, so they serve once
        return *(None if g is None else g.mul_(scale) for g in gradients), None, None, None, None


class _Vectors(torch.autograd.Function):
    """Log-probabilities at given ids, entropy and divergence of each row; logits are made again in backward.

    With p = softmax(z), H its entropy and q the reference:

        d logp(y) / dz = 1_y - p                        d H / dz = -p (log p + H)
        d KL(q || p) / dz = p - q                       d KL(p || q) / dz = p (log p - log q - KL)

    so the whole gradient is p * (a log p + b - c log q) - d q plus a few scattered entries, with a, b, c, d by row.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_nH: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids_nK: Tensor,
        reference: _ReferenceRows | None,
        head: Head,
        entropy: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        num_tokens, wide = hidden_nH.shape[0], wide_dtype(hidden_nH)
        whole_rows = entropy or reference is not None
        memory = head.buffer(hidden_nH, 2 if whole_rows else 1)
        chosen_nK = hidden_nH.new_zeros(ids_nK.shape, dtype=wide)
        log_sums_n1 = hidden_nH.new_zeros(num_tokens, 1, dtype=wide)
        entropy_n = hidden_nH.new_zeros(num_tokens, dtype=wide) if entropy else None
        kl_n = hidden_nH.new_zeros(num_tokens, dtype=wide) if reference is not None else None
        for rows in head.slices(num_tokens):
            z, _ = head.logits(hidden_nH[rows], weight, bias, memory[0])
            scratch = memory[-1, : z.shape[0]]  # z itself where only gathered entries are read
            top_c1 = z.amax(1, keepdim=True)
            chosen = z.gather(1, ids_nK[rows])
            log_sums_n1[rows] = torch.sub(z, top_c1, out=scratch).exp_().sum(1, keepdim=True).log_().add_(top_c1)
            chosen_nK[rows] = chosen.sub_(log_sums_n1[rows])
            if not whole_rows:
                continue
            log_p = z.sub_(log_sums_n1[rows])
            p = torch.exp(log_p, out=scratch)
            if entropy_n is not None:
                entropy_n[rows] = -torch.linalg.vecdot(p, log_p)
            if kl_n is not None and reference is not None:
                log_q = reference.log_q(rows, head)
                kl_n[rows] = reference.divergence(p, log_p, log_q)
        ctx.save_for_backward(hidden_nH, weight, bias, ids_nK, log_sums_n1, entropy_n, kl_n)
        ctx.reference, ctx.head = reference, head
        ctx.set_materialize_grads(False)
        return chosen_nK, entropy_n, kl_n

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, g_chosen_nK: Tensor | None, g_entropy_n: Tensor | None, g_kl_n: Tensor | None
    ) -> Any:
        hidden_nH, weight, bias, ids_nK, log_sums_n1, entropy_n, kl_n = ctx.saved_tensors
        head, reference = ctx.head, ctx.reference
        gradients = HeadGradients(hidden_nH, weight, bias, ctx.needs_input_grad[:3])
        reverse = g_kl_n is not None and reference.kind == "reverse"
        whole_rows = g_entropy_n is not None or reverse
        memory = head.buffer(hidden_nH, 2 if whole_rows else 1)
        # The row factors b (of p) and a (of p log p); see the class.
        b_n1, a_n1 = torch.zeros_like(log_sums_n1), torch.zeros_like(log_sums_n1)
        if g_chosen_nK is not None:
            b_n1 -= g_chosen_nK.sum(1, keepdim=True)
        if g_entropy_n is not None:
            a_n1 -= g_entropy_n[:, None]
            b_n1 -= (g_entropy_n * entropy_n)[:, None]
        if g_kl_n is not None:
            a_n1 += g_kl_n[:, None] if reverse else 0.0
            b_n1 += (-g_kl_n * kl_n if reverse else g_kl_n)[:, None]
        for rows in head.slices(hidden_nH.shape[0]):
            z, slope = head.logits(hidden_nH[rows], weight, bias, memory[0])
            log_p = z.sub_(log_sums_n1[rows])
            p = torch.exp(log_p, out=memory[-1, : z.shape[0]])
            log_q = reference.log_q(rows, head) if g_kl_n is not None else None
            if whole_rows:
                log_p.mul_(a_n1[rows]).add_(b_n1[rows])
                if log_q is not None and g_kl_n is not None and reverse:
                    log_p.addcmul_(log_q, g_kl_n[rows, None], value=-1.0)
                grad = p.mul_(log_p)
            else:
                grad = p.mul_(b_n1[rows])
            if log_q is not None and g_kl_n is not None and not reverse:
                grad.addcmul_(log_q.exp_(), g_kl_n[rows, None], value=-1.0)
            if g_chosen_nK is not None:
                grad.scatter_add_(1, ids_nK[rows], g_chosen_nK[rows])
            gradients.add(rows, hidden_nH[rows], weight, head.slope if slope is None else slope, grad)
        return *gradients.result(weight, bias), None, None, None, None


@dataclass(frozen=True, slots=True)
class _ReferenceRows:
    """A reference's hidden states at the tokens that are read."""

    hidden_nH: Tensor
    of: Reference

    @property
    def kind(self) -> str:
        return self.of.kind

    def log_q(self, rows: slice, head: Head) -> Tensor:
        """log q [c, V] of a chunk."""
        own = Head(head.vocab_size, self.of.softcap, self.of.logit_scale, head.temperature, head.chunk)
        hidden_cH = self.hidden_nH[rows]
        out = torch.empty(hidden_cH.shape[0], head.vocab_size, dtype=wide_dtype(hidden_cH), device=hidden_cH.device)
        return own.logits(hidden_cH, self.of.weight_VH, self.of.bias, out)[0].log_softmax(1)

    def divergence(self, p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        """[c]; `p` and `log_p` are spent."""
        if self.kind == "reverse":
            return torch.linalg.vecdot(p, log_p.sub_(log_q))
        return torch.linalg.vecdot(log_q.exp(), log_q.sub_(log_p))


def previous_token(block: Block) -> Tensor:
    """int64 [T]: the token whose hidden state predicts token t, -1 where there is none.

    That is t - 1 inside a document; for a document's first token the last token of its shared prefix; none for the
    first token of a document without a prefix, and for padding. Tensor operations only, the host never waits.
    """
    index_T = torch.arange(block.num_tokens, device=block.token_ids.device)
    start_T, _, prefix_start_T, prefix_end_T = block.documents[block.document_ids.clamp(min=0)].long().unbind(1)
    before_first_T = torch.where(prefix_end_T > prefix_start_T, prefix_end_T - 1, -1)
    previous_T = torch.where(index_T > start_T, index_T - 1, before_first_T)
    return torch.where(block.document_ids >= 0, previous_T, -1)


def project(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    token_ids_T: Tensor,
    reads_T: Tensor,
    needs: frozenset[str],
    *,
    previous_T: Tensor,
    coefficients_T: Tensor | None = None,
    topk_ids_TK: Tensor | None = None,
    reference: Reference | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk: int = 256,
) -> TokenOutputs:
    """What `needs` names, at the tokens that `reads_T` marks; 0 at the others.

    logits = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature (no tanh without a softcap), in the
    weight's dtype; every sum over the vocabulary, and dW over chunks, is float32 (float64 for float64 inputs).

    Args:
        hidden_TH: hidden states of a block, after the final norm.
        weight_VH: the head's weight, [V, H]; rows from `vocab_size` on are padding and outside of every sum.
        token_ids_T: int64 [T].
        reads_T: bool [T], the tokens whose outputs are read. One that nothing predicts is passed over.
        needs: `weighted_nll`, and any of `VECTORS`.
        previous_T: `previous_token(block)`.
        coefficients_T: [T], for `weighted_nll`. No gradient flows into them.
        topk_ids_TK: int64 [T, K], for `topk_logprobs`.
        reference: for `full_kl`.
        chunk: most tokens projected at once: the transient memory is chunk * V * 4 bytes, once more for
            `entropy`, twice more for `full_kl`, and once more with a soft cap.

    A block where nothing is read gives zeros that hang on the graph, so a backward pass and its collectives still run.
    """
    assert needs <= VECTORS | {"weighted_nll"}, f"the projection cannot make {sorted(needs - VECTORS)}"
    head = Head(vocab_size or weight_VH.shape[0], softcap, logit_scale, temperature, chunk)
    read_n = torch.nonzero(reads_T & (previous_T >= 0)).squeeze(1)
    hidden_nH = hidden_TH.index_select(0, previous_T[read_n])
    ids_n = token_ids_T[read_n]
    outputs = TokenOutputs()

    if "weighted_nll" in needs:
        assert coefficients_T is not None, "weighted_nll without coefficients"
        outputs.weighted_nll = _WeightedNLL.apply(
            hidden_nH, weight_VH, bias, ids_n, coefficients_T[read_n], head, torch.is_grad_enabled()
        )
    if not needs & VECTORS:
        return outputs

    ids_nK = ids_n[:, None]
    if "topk_logprobs" in needs:
        assert topk_ids_TK is not None, "topk_logprobs without topk_ids"
        ids_nK = torch.cat([ids_nK, topk_ids_TK[read_n]], 1)
    rows = None
    if "full_kl" in needs:
        assert reference is not None, "full_kl without a reference"
        rows = _ReferenceRows(reference.hidden_TH.detach().index_select(0, previous_T[read_n]), reference)
    chosen_nK, entropy_n, kl_n = _Vectors.apply(hidden_nH, weight_VH, bias, ids_nK, rows, head, "entropy" in needs)

    def spread(vector_n: Tensor) -> Tensor:
        return vector_n.new_zeros(reads_T.shape[0], *vector_n.shape[1:]).index_copy(0, read_n, vector_n)

    outputs.logprobs = spread(chosen_nK[:, 0]) if "logprobs" in needs else None
    outputs.topk_logprobs = spread(chosen_nK[:, 1:]) if "topk_logprobs" in needs else None
    outputs.entropy = spread(entropy_n) if entropy_n is not None else None
    outputs.full_kl = spread(kl_n) if kl_n is not None else None
    return outputs
