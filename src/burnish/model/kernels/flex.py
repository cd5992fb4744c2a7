"""Document attention by FlexAttention: any window, soft cap, prefix or head width in one compiled CUDA kernel.

Built of differentiable functions of tensors, so autograd and torch.compile see through it, and the layout, being data,
compiles once. Source: `torch.nn.attention.flex_attention`. It has no backward pass on CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def flex_document_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    first: int = 0,
) -> Tensor:
    """`q` [Hq, t, Dk], `k` [Hkv, T, Dk], `v` [Hkv, T, Dv], `documents` int32 [D, 4] -> [Hq, t, Dv], zero on padding."""
    spans = spans_of_tokens(documents.to(q.device, non_blocking=True), k.shape[1])
    out, lse = _compiled()(q, k, v, spans, scale, window, softcap, first)
    if sinks is not None:
        out = out * torch.sigmoid(lse - sinks.unsqueeze(1)).unsqueeze(-1).to(out.dtype)
    return out.transpose(0, 1).contiguous().transpose(0, 1)


def spans_of_tokens(documents: Tensor, num_tokens: int) -> Tensor:
    """int32 [3, T]: start, prefix_start and prefix_end of each token's document; padding starts after the row.

    >>> spans_of_tokens(torch.tensor([[0, 2, 0, 0], [2, 3, 0, 2], [0, 0, 0, 0]]), 4)
    tensor([[0, 0, 2, 4], [0, 0, 0, 0], [0, 0, 2, 0]])
    """
    token = torch.arange(num_tokens, device=documents.device)
    inside = (token >= documents[:, :1]) & (token < documents[:, 1:2])
    padding = documents.new_tensor([[num_tokens], [0], [0]])
    spans = documents[:, [0, 2, 3]].T[:, inside.int().argmax(0)]
    return torch.where(inside.any(0), spans, padding)


def visible(spans: Tensor, window: int | None, first: int = 0) -> Callable[[Any, Any, Tensor, Tensor], Tensor]:
    """FlexAttention's mask function over `spans_of_tokens`, where query 0 is token `first`."""
    start, prefix_start, prefix_end = spans

    def sees(_batch: Any, _head: Any, row: Tensor, key: Tensor) -> Tensor:
        query = row + first
        own = (key >= start[query]) & (key <= query)
        prefix = (key >= prefix_start[query]) & (key < prefix_end[query])
        if window is None:
            return own | prefix
        own_age, prefix_age = query - key, query - start[query] + prefix_end[query] - key
        return (own & (own_age < window)) | (prefix & (prefix_age < window))

    return sees


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """`out` [Hq, t, Dv] and `lse` [Hq, t] by FlexAttention."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    def cap(score: Tensor, _batch: Any, _head: Any, _query: Tensor, _key: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    mask = create_block_mask(visible(spans, window, first), None, None, q.shape[1], k.shape[1], device=q.device)
    out, aux = flex_attention(
        q.unsqueeze(0),
        k.unsqueeze(0),
        v.unsqueeze(0),
        score_mod=None if softcap is None else cap,
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[0] != k.shape[0],
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None
    return out[0], aux.lse[0]


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(attend, dynamic=False)
