"""Document attention on CUDA: one variable-length FlashAttention call over the whole row.

Documents become `cu_seqlens`; the gaps between them (padding) become sequences of their own, whose outputs and
gradients are cleared. A layout with shared prefixes gathers keys as prefix ++ own for each document, since
FlashAttention aligns a causal mask to the bottom right: with 2 queries and 5 keys, the first query sees keys 0..3.

Calls `aten::_flash_attention_forward` and `_backward`, which stand under `torch.nn.attention.varlen.varlen_attn`: its
own signature changed between torch 2.11 (`is_causal=`) and 2.13 (`window_size=`), and its backward pass cannot be
handed the log-sum-exp that sinks enlarge. `torch.nn.attention.activate_flash_attention_impl("FA3")` replaces these too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from burnish.model.kernels.sdpa import Documents


def obstacle(q: Tensor, v: Tensor, softcap: float | None) -> str | None:
    """What keeps this kernel from it, in words that follow "does not do"; None if nothing does."""
    if q.device.type != "cuda":
        return f"attention on {q.device.type}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return str(q.dtype).removeprefix("torch.")
    if q.shape[-1] != v.shape[-1] or q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"heads of width {q.shape[-1]} (keys) and {v.shape[-1]} (values)"
    return None if softcap is None else "soft caps"


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    scale: float,
    window: int | None,
    softcap: float | None,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """`q` [Hq, t, Dk], `k` [Hkv, T, Dk], `v` [Hkv, T, Dv] -> `out` [Hq, t, Dv], `lse` [Hq, t]; see the package."""
    assert softcap is None, "refused by obstacle()"
    layout = _layout(documents, q.shape[1], k.shape[1], first, q.device)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *_operands(q, k, v, layout),
        *layout.lengths,
        0.0,
        window is None,
        False,
        scale=scale,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=0,
    )
    out = out.transpose(0, 1)
    for gap in layout.gaps:
        rows = slice(gap.start - first, gap.stop - first)
        out[:, rows] = 0
        lse[:, rows] = 0
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Documents,
    scale: float,
    window: int | None,
    softcap: float | None,
    first: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `q`, `k` and `v`, in their shapes and strides."""
    layout = _layout(documents, q.shape[1], k.shape[1], first, q.device)
    unused = torch.empty(0, device=q.device)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    grads = torch.ops.aten._flash_attention_backward(
        grad_out.transpose(0, 1).contiguous(),
        *_operands(q, k, v, layout),
        out.transpose(0, 1),
        lse,
        *layout.lengths,
        0.0,
        window is None,
        no_dropout,
        unused,
        scale=scale,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=0,
    )
    whole = [torch.empty_like(tensor) for tensor in (q, k, v)]
    for tensor, grad, is_key in zip(whole, grads, (False, True, True), strict=True):
        if is_key and layout.keys is not None:
            # A prefix collects from every completion: in float32, or small terms are lost in half precision.
            total = grad.new_zeros(tensor.shape[1], *grad.shape[1:], dtype=torch.float32)
            grad = total.index_add_(0, layout.keys, grad.float())
        tensor.copy_(grad.transpose(0, 1))
        before = 0 if is_key else first
        for gap in layout.gaps:
            tensor[:, gap.start - before : gap.stop - before] = 0
    return whole[0], whole[1], whole[2]


class _Layout(NamedTuple):
    lengths: tuple[Tensor, Tensor, int, int]
    """cu_seqlens of queries, of keys (int32), and the longest of each."""
    keys: Tensor | None
    """Which tokens stand in the gathered keys, int64; None: the row as it is."""
    gaps: list[slice]
    """Padding, in places of keys."""


def _layout(documents: Documents, num_queries: int, num_keys: int, first: int, device: torch.device) -> _Layout:
    spans, gaps, at, last = [], [], first, first + num_queries
    for start, end, prefix_start, prefix_end in [*sorted(documents), (last, last, 0, 0)]:
        if start > at:
            gaps.append(slice(at, start))
            spans.append((at, start, at, at))
        if end > start:
            spans.append((start, end, prefix_start, prefix_end))
        at = end
    queries = [end - start for start, end, _, _ in spans]
    keys = [end - start + prefix_end - prefix_start for start, end, prefix_start, prefix_end in spans]
    gathered = None
    if keys != queries or num_keys != num_queries:
        pieces = [torch.arange(*piece) for s, e, ps, pe in spans for piece in ((ps, pe), (s, e))]
        gathered = torch.cat(pieces).to(device, non_blocking=True)
    return _Layout((_cumulated(queries, device), _cumulated(keys, device), max(queries), max(keys)), gathered, gaps)


def _cumulated(lengths: list[int], device: torch.device) -> Tensor:
    total = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    total[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
    return total.to(device, non_blocking=True)


def _operands(q: Tensor, k: Tensor, v: Tensor, layout: _Layout) -> tuple[Tensor, Tensor, Tensor]:
    """[T, H, D] each, keys and values gathered where there are shared prefixes."""
    q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
    if layout.keys is not None:
        k, v = k.index_select(0, layout.keys), v.index_select(0, layout.keys)
    return q, k, v
