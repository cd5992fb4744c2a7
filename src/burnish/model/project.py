"""From hidden states to what a loss reads, without ever holding the logits of a block.

The vocabulary is the widest thing in training: 1,024 tokens x 151,936 words x 4 bytes are 0.6 GB of logits, and plain
cross-entropy holds three such tensors. So the tokens that no loss reads are dropped first, and the rest go through the
head `chunk` tokens at a time. Two ways:

    weighted_nll   the loss is linear in the log-probabilities: its gradient is known in the forward pass. Three matrix
                   products (logits, dH, dW) and one chunk of logits.
    [T] vectors    any loss arithmetic may follow: the backward pass makes each chunk's logits again. Four products.

Divergences from a second model are made in `divergence.py`, logits of a few ids and ranks in `candidates.py`. Where
each rank has a part of the head's rows, every rank calls this with the same tokens, the sums over the vocabulary go
through `VocabularyShard`, and the outputs are the same on all of them. This
module must not know which loss reads its outputs, nor where the hidden states come from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from burnish.model.candidates import candidate_logits, ranks
from burnish.model.divergence import Reference, divergence_rows
from burnish.model.head_chunks import Head, HeadGradients, wide_dtype
from burnish.model.vocabulary_shard import WHOLE, VocabularyShard
from burnish.types import TokenOutputs

if TYPE_CHECKING:
    from burnish.types import Block, Ranking

VECTORS = frozenset({"logprobs", "entropy", "topk_logprobs"})
"""The `needs` that one pass of `_Vectors` makes together."""
PROJECTED = VECTORS | {"weighted_nll", "full_kl", "candidate_logits", "ranks", "hidden_states"}
"""All `needs` that are made here (`scores` and `embeddings` come from other heads)."""


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
            z.sub_(head.shard.max(z))
            chosen_c1 = head.shard.pick(z, ids_c1)
            sums_c1, chosen_c1 = head.shard.sum(z.exp_().sum(1, keepdim=True), chosen_c1)
            total += (coefficients_c1 * (sums_c1.log() - chosen_c1)).sum()
            if any(wanted):
                head.shard.add(z.mul_(coefficients_c1 / sums_c1), ids_c1, -coefficients_c1)
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
    """Log-probabilities at given ids and entropy of each row; logits are made again in backward.

    With p = softmax(z) and H its entropy:

        d logp(y) / dz = 1_y - p                        d H / dz = -p (log p + H)

    so the whole gradient is p * (a log p + b) plus a few scattered entries, with a and b by row.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_nH: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids_nK: Tensor,
        head: Head,
        entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        num_tokens, wide = hidden_nH.shape[0], wide_dtype(hidden_nH)
        memory = head.buffer(hidden_nH, 2 if entropy else 1)
        chosen_nK = hidden_nH.new_zeros(ids_nK.shape, dtype=wide)
        log_sums_n1 = hidden_nH.new_zeros(num_tokens, 1, dtype=wide)
        entropy_n = hidden_nH.new_zeros(num_tokens, dtype=wide) if entropy else None
        for rows in head.slices(num_tokens):
            z, _ = head.logits(hidden_nH[rows], weight, bias, memory[0])
            scratch = memory[-1, : z.shape[0]]  # z itself where only gathered entries are read
            top_c1, chosen = head.shard.max(z), head.shard.pick(z, ids_nK[rows])
            sums_c1 = torch.sub(z, top_c1, out=scratch).exp_().sum(1, keepdim=True)
            sums_c1, chosen = head.shard.sum(sums_c1, chosen)
            log_sums_n1[rows] = sums_c1.log_().add_(top_c1)
            chosen_nK[rows] = chosen.sub_(log_sums_n1[rows])
            if entropy_n is not None:
                log_p = z.sub_(log_sums_n1[rows])
                entropy_n[rows] = -torch.exp(log_p, out=scratch).mul_(log_p).sum(1)
        if entropy_n is not None:
            (entropy_n,) = head.shard.sum(entropy_n)
        ctx.save_for_backward(hidden_nH, weight, bias, ids_nK, log_sums_n1, entropy_n)
        ctx.head = head
        ctx.set_materialize_grads(False)
        return chosen_nK, entropy_n

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, g_chosen_nK: Tensor | None, g_entropy_n: Tensor | None
    ) -> Any:
        hidden_nH, weight, bias, ids_nK, log_sums_n1, entropy_n = ctx.saved_tensors
        head = ctx.head
        gradients = HeadGradients(hidden_nH, weight, bias, ctx.needs_input_grad[:3])
        memory = head.buffer(hidden_nH, 1 if g_entropy_n is None else 2)
        b_n1 = torch.zeros_like(log_sums_n1)
        if g_chosen_nK is not None:
            b_n1 -= g_chosen_nK.sum(1, keepdim=True)
        if g_entropy_n is not None:
            b_n1 -= (g_entropy_n * entropy_n)[:, None]
        for rows in head.slices(hidden_nH.shape[0]):
            z, slope = head.logits(hidden_nH[rows], weight, bias, memory[0])
            log_p = z.sub_(log_sums_n1[rows])
            p = torch.exp(log_p, out=memory[-1, : z.shape[0]])
            if g_entropy_n is not None:
                grad = p.mul_(log_p.mul_(-g_entropy_n[rows, None]).add_(b_n1[rows]))
            else:
                grad = p.mul_(b_n1[rows])
            if g_chosen_nK is not None:
                head.shard.add(grad, ids_nK[rows], g_chosen_nK[rows])
            gradients.add(rows, hidden_nH[rows], weight, head.slope if slope is None else slope, grad)
        return *gradients.result(weight, bias), None, None, None


def project(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    token_ids_T: Tensor,
    reads_T: Tensor,
    needs: frozenset[str],
    *,
    previous_T: Tensor,
    first: int = 0,
    coefficients_T: Tensor | None = None,
    topk_ids_TK: Tensor | None = None,
    candidates_K: Tensor | None = None,
    reference: Reference | None = None,
    ranking: Ranking | None = None,
    block: Block | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk: int = 256,
    shard: VocabularyShard = WHOLE,
) -> TokenOutputs:
    """What `needs` names, at the tokens that `reads_T` marks; 0 at the others.

    logits = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature (no tanh without a softcap), in the
    weight's dtype; every sum over the vocabulary, and dW over chunks, is float32 (float64 for float64 inputs).

    Args:
        hidden_TH: hidden states of a block, after the final norm; or of its tokens from `first` on, fewer than T.
        weight_VH: the head's weight, [V, H], or the rows of it that are on this rank; rows that stand for ids from
            `vocab_size` on are padding and outside of every sum.
        token_ids_T: int64 [T].
        reads_T: bool [T], the tokens whose outputs are read. One that nothing predicts is passed over.
        needs: any of `PROJECTED`.
        previous_T: `previous_token(block)`.
        first: token of the block whose state is `hidden_TH[0]`. A read whose predictor is not there is passed over.
        coefficients_T: [T], for `weighted_nll`. No gradient flows into them.
        topk_ids_TK: int64 [T, K], for `topk_logprobs`.
        candidates_K: int64 [K], for `candidate_logits`.
        reference: for `full_kl`; its temperature is the divergence's own, whatever `temperature` is.
        ranking, block: for `ranks`; the block says what stood before a token.
        chunk: most tokens projected at once: the transient memory is chunk * V * 4 bytes, once more for
            `entropy`, and as much again with a soft cap. dW is summed in float32, whatever the weights are in.
        shard: which rows `weight_VH` and `bias` hold. Their gradients are of those rows, that of `hidden_TH` is whole.

    A block where nothing is read gives zeros that hang on the graph, so a backward pass and its collectives still run.
    """
    assert needs <= PROJECTED, f"the projection cannot make {sorted(needs - PROJECTED)}"
    here = shard.num_tokens(vocab_size or weight_VH.shape[0], weight_VH)
    head = Head(here, softcap, logit_scale, temperature, chunk, shard)
    row_T = torch.where(previous_T >= 0, previous_T - first, -1)
    read_n = torch.nonzero(reads_T & (row_T >= 0) & (row_T < hidden_TH.shape[0])).squeeze(1)
    hidden_nH, ids_n = hidden_TH.index_select(0, row_T[read_n]), token_ids_T[read_n]
    outputs = TokenOutputs()
    if "hidden_states" in needs:
        outputs.hidden_states = _spread(hidden_nH, read_n, reads_T)
    hidden_nH = shard.enter(hidden_nH)

    def spread(vector_n: Tensor) -> Tensor:
        return _spread(vector_n, read_n, reads_T)

    if "weighted_nll" in needs:
        assert coefficients_T is not None, "weighted_nll without coefficients"
        outputs.weighted_nll = _WeightedNLL.apply(
            hidden_nH, weight_VH, bias, ids_n, coefficients_T[read_n], head, torch.is_grad_enabled()
        )
    if needs & VECTORS:
        ids_nK = ids_n[:, None]
        if "topk_logprobs" in needs:
            assert topk_ids_TK is not None, "topk_logprobs without topk_ids"
            ids_nK = torch.cat([ids_nK, topk_ids_TK[read_n]], 1)
        chosen_nK, entropy_n = _Vectors.apply(hidden_nH, weight_VH, bias, ids_nK, head, "entropy" in needs)
        outputs.logprobs = spread(chosen_nK[:, 0]) if "logprobs" in needs else None
        outputs.topk_logprobs = spread(chosen_nK[:, 1:]) if "topk_logprobs" in needs else None
        outputs.entropy = spread(entropy_n) if entropy_n is not None else None
    if "full_kl" in needs:
        assert reference is not None, "full_kl without a reference"
        outputs.full_kl = spread(divergence_rows(hidden_nH, weight_VH, bias, head, reference, read_n))
    if "candidate_logits" in needs:
        assert candidates_K is not None, "candidate_logits without candidates"
        outputs.candidate_logits = spread(candidate_logits(hidden_nH, weight_VH, bias, ids_n, candidates_K, head))
    if "ranks" in needs:
        assert ranking is not None and block is not None, "ranks without a ranking"
        outputs.ranks = spread(
            ranks(hidden_nH, weight_VH, bias, ids_n, head, ranking=ranking, read_n=read_n, block=block)
        )
    return outputs


def _spread(vector_n: Tensor, read_n: Tensor, reads_T: Tensor) -> Tensor:
    """[T, ...]: entries at the tokens that are read, 0 elsewhere."""
    return vector_n.new_zeros(reads_T.shape[0], *vector_n.shape[1:]).index_copy(0, read_n, vector_n)
