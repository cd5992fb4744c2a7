"""The leak probe: may this model be trained on packed rows?

Attention keeps documents apart; short convolutions, linear attention and state spaces run over their borders, silently.
So the loaded model itself is asked, on a row of two short documents, before the first step.

Must not know how attention is computed or who loaded the model.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from burnish.model.collectives import collect
from burnish.model.positions import is_rotary
from burnish.types import Block

if TYPE_CHECKING:
    from burnish.model.policy_model import PolicyModel

_LENGTH = 12
"""Tokens a document: longer than any short convolution's kernel (3 or 4 in LFM2, Mamba and Qwen3-Next)."""
_ATTENTION = frozenset({"full_attention", "sliding_attention", "attention"})


def packing_leaks(model: PolicyModel, longest: int = _LENGTH) -> str | None:
    """Why documents packed into one row would see each other in `model`; None where they stay apart.

    Two things are demanded of document B behind document A in one row: other tokens in A leave B's logits as they were,
    bit for bit, and B is what it is alone, within rounding. Mixtures of experts batch tokens by expert, so other tokens
    in A may round B differently (1e-6 in float32): there, the gradient of B's logits with respect to A's embeddings
    must be exactly zero, which no rounding can disturb. And B behind A as a shared prompt must be what it is as A's
    own continuation.

    Under rotary embeddings A stands where a document of `longest` tokens ends, since some of them (`dynamic`,
    `longrope`) choose every token's frequencies by the largest position of the whole row. A table of learned positions
    has an end, and each of its rows stands for itself.

    A micro-batch lays rows end to end, so a model that leaks needs `micro_batch_size: 1` even where each row holds one
    document. Costs five forward passes of at most 24 tokens.
    """
    was_training = model.training
    model.eval()
    try:
        return _probe(model, max(longest - _LENGTH, 0) if is_rotary(model.hf_config) else 0)
    finally:
        model.train(was_training)


def _probe(model: PolicyModel, position: int) -> str | None:
    tokens = torch.randint(1, model.vocab_size, (3, _LENGTH), generator=torch.Generator().manual_seed(0))
    a, other_a, b = tokens.to(next(model.parameters()).device)
    with torch.no_grad():
        packed, changed = (_logits(model, first, b, position=position)[_LENGTH:] for first in (a, other_a))
        alone = _logits(model, b)
    if not torch.equal(packed, changed) and _gradient_reaches_over(model, a, b):
        share = _distance(changed, packed).max().item()
        return f"other tokens in one document move the next one's logits by {share:.1e}{_suspects(model)}"
    # The median over tokens: under half precision, rounding may send a token or two to another expert.
    share = _distance(packed, alone).median().item()
    if share > (1e-3 if packed.dtype == torch.float32 else 0.05):
        return f"a document's logits behind another differ by {share:.1e} from its own alone{_suspects(model)}"
    with torch.no_grad():
        shared = _logits(model, a, b, shared=True)[_LENGTH:]
        continued = _logits(model, torch.cat([a, b]))[_LENGTH:]
    share = _distance(shared, continued).median().item()
    if share > (1e-3 if packed.dtype == torch.float32 else 0.05):
        return f"an answer's logits behind a shared prompt differ by {share:.1e} from those with its own copy of it"
    return None


def _logits(model: PolicyModel, *documents: Tensor, position: int = 0, shared: bool = False) -> Tensor:
    """[T, V], for documents of one length laid end to end, the first one from `position` on; `shared`: it is the
    shared prompt of those after it."""
    token_ids, length = torch.cat(documents), len(documents[0])
    index = torch.arange(len(documents), device=token_ids.device)
    start = (index * length).to(torch.int32)
    positions = torch.arange(length, device=token_ids.device).repeat(len(documents))
    positions[:length] += position
    prefix_end = torch.where(index > 0, length * shared, 0).to(torch.int32)
    positions[length:] += length * shared
    block = Block(
        token_ids=token_ids,
        loss_mask=torch.zeros_like(token_ids, dtype=torch.bool),
        position_ids=positions,
        document_ids=index.repeat_interleave(length),
        documents=torch.stack([start, start + length, torch.zeros_like(start), prefix_end], 1),
        group_ids=index,
    )
    return model.logits(block)


def _gradient_reaches_over(model: PolicyModel, a: Tensor, b: Tensor) -> bool:
    embedded: list[Tensor] = []

    def cut(_module: torch.nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    hook = model.causal_lm.get_input_embeddings().register_forward_hook(cut)
    try:
        with torch.enable_grad():
            logits = _logits(model, a, b)[_LENGTH:]
            weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
            (gradient,) = torch.autograd.grad((logits * weight).sum(), embedded)
            group = model.vocabulary_shard.group
            gradient = gradient if group is None else collect(gradient, 1, group)  # each rank embeds its own tokens
    finally:
        hook.remove()
    return bool(gradient[0, :_LENGTH].any())


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """[T]: length of the difference over the length of `y`, token by token."""
    x, y = x.float(), y.float()
    return (x - y).norm(dim=-1) / y.norm(dim=-1)


def _suspects(model: PolicyModel) -> str:
    kinds = Counter(getattr(model.hf_config.get_text_config(), "layer_types", None) or ())
    named = [f"{count} of {kinds.total()} layers are {kind}" for kind, count in kinds.items() if kind not in _ATTENTION]
    return f" ({', '.join(named)})" if named else ""
