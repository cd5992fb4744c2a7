"""Document attention on any device, one document at a time on views of the row.

Plain causal documents on CPU go to PyTorch's fused kernel, whose cost is the sum of squared document lengths: a boolean
mask over the row costs the square of the row. A shared prefix is a second call without a mask, merged by the two
log-sum-exps (as in ring attention, Liu et al. 2023, arXiv 2310.01889, section 3): `is_causal` with fewer queries than
keys would be aligned to the top left, so that the first query of a completion saw only the first token of its prompt.
Windows that bite, soft caps, unequal head widths and other devices take `_Math`: exact, slower, 128 queries at a time.

Knows nothing of sinks, models or recipes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Documents = list[tuple[int, int, int, int]]
"""(start, end, prefix_start, prefix_end) of each document in use; the prefix is empty where the two are equal."""

_QUERIES_AT_ONCE = 128
"""Rows of scores that the math path holds: at 16 heads and 8,192 keys, 64 MiB for each of its four temporaries."""


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
    num_heads, num_tokens, _ = q.shape
    out = q.new_zeros(num_tokens, num_heads, v.shape[-1]).transpose(0, 1)
    lse = torch.zeros(num_heads, num_tokens, dtype=lse_dtype(q), device=q.device)
    groups = (k.shape[0], num_heads // k.shape[0])
    out_G, lse_G, q_G = out.unflatten(0, groups), lse.unflatten(0, groups), _rows_dense(q).unflatten(0, groups)
    k, v = _rows_dense(k), _rows_dense(v)
    for start, end, prefix_start, prefix_end in documents:
        own, prefix = slice(start, end), slice(prefix_start, prefix_end)
        rows = slice(start - first, end - first)
        length = end - start + prefix_end - prefix_start
        if _fused(q, v, length, window, softcap):
            part, part_lse = _fused_forward(q_G[:, :, rows], k[:, own], v[:, own], True, scale)
            if prefix_end > prefix_start:
                before = _fused_forward(q_G[:, :, rows], k[:, prefix], v[:, prefix], False, scale)
                part, part_lse = _merge(part, part_lse, *before)
            out_G[:, :, rows], lse_G[:, :, rows] = part, part_lse
        else:
            math = _Math(q_G[:, :, rows], k, v, own, prefix, scale, window, softcap)
            math.forward(out_G[:, :, rows], lse_G[:, :, rows])
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
    dq, dk, dv = (torch.zeros_like(tensor) for tensor in (q, k, v))
    groups = (k.shape[0], q.shape[0] // k.shape[0])
    q_G, grad_G, out_G = (_rows_dense(tensor).unflatten(0, groups) for tensor in (q, grad_out, out))
    dq_G, lse_G = dq.unflatten(0, groups), lse.unflatten(0, groups)
    k, v = _rows_dense(k), _rows_dense(v)
    for start, end, prefix_start, prefix_end in documents:
        own, prefix = slice(start, end), slice(prefix_start, prefix_end)
        mine = slice(start - first, end - first)
        rows = (q_G[:, :, mine], grad_G[:, :, mine], out_G[:, :, mine], lse_G[:, :, mine])
        if _fused(q, v, end - start + prefix_end - prefix_start, window, softcap):
            for keys, causal in ((own, True), (prefix, False)) if prefix_end > prefix_start else ((own, True),):
                part_q, part_k, part_v = _fused_backward(*rows, k[:, keys], v[:, keys], causal, scale)
                dq_G[:, :, mine] += part_q
                dk[:, keys] += part_k
                dv[:, keys] += part_v
        else:
            math = _Math(rows[0], k, v, own, prefix, scale, window, softcap)
            math.backward(*rows[1:], dq_G[:, :, mine], dk, dv)
    return dq, dk, dv


def lse_dtype(q: Tensor) -> torch.dtype:
    """Scores and their log-sum-exp are float32 under half precision."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _rows_dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _fused(q: Tensor, v: Tensor, length: int, window: int | None, softcap: float | None) -> bool:
    window_bites = window is not None and window < length
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1] and not window_bites and softcap is None


def _fused_forward(q_G: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Key/value heads are the kernel's batch, a group's query heads its heads: no key is repeated in memory."""
    group = q_G.shape[1]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_G,
        k.unsqueeze(1).expand(-1, group, -1, -1),
        v.unsqueeze(1).expand(-1, group, -1, -1),
        0.0,
        causal,
        scale=scale,
    )


def _fused_backward(
    q_G: Tensor, grad_G: Tensor, out_G: Tensor, lse_G: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    group = q_G.shape[1]
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_G,
        q_G,
        k.unsqueeze(1).expand(-1, group, -1, -1),
        v.unsqueeze(1).expand(-1, group, -1, -1),
        out_G,
        lse_G,
        0.0,
        causal,
        scale=scale,
    )
    return dq, dk.sum(1), dv.sum(1)


def _merge(out_1: Tensor, lse_1: Tensor, out_2: Tensor, lse_2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two sets of keys, from the attention over each."""
    lse = torch.logaddexp(lse_1, lse_2)
    weight_1, weight_2 = (lse_1 - lse).exp().unsqueeze(-1), (lse_2 - lse).exp().unsqueeze(-1)
    return out_1 * weight_1 + out_2 * weight_2, lse


class _Math:
    """One document written out: scores of at most 128 queries at a time, in float32 at least.

    Positions count from the prefix's start: keys are prefix ++ own, and query i of the document stands at
    `len(prefix) + i`. A window of w sees itself and the w - 1 keys before it.
    """

    def __init__(
        self,
        q_G: Tensor,
        k: Tensor,
        v: Tensor,
        own: slice,
        prefix: slice,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> None:
        self.dtype = lse_dtype(q_G)
        self.q_G, self.own, self.prefix = q_G, own, prefix
        self.k, self.v = (torch.cat([x[:, prefix], x[:, own]], 1).to(self.dtype) for x in (k, v))
        self.offset = prefix.stop - prefix.start
        self.scale, self.window, self.softcap = scale, window, softcap

    def forward(self, out_G: Tensor, lse_G: Tensor) -> None:
        """Fills `out_G` [Hkv, G, L, Dv] and `lse_G` [Hkv, G, L]."""
        for rows, keys in self._chunks():
            scores = self._scores(self._flat(self.q_G, rows), rows, keys)[0]
            lse = scores.logsumexp(-1)
            out = (scores - lse.unsqueeze(-1)).exp() @ self.v[:, keys]
            out_G[:, :, rows] = out.view(*self.q_G.shape[:2], -1, out.shape[-1])
            lse_G[:, :, rows] = lse.view(*self.q_G.shape[:2], -1)

    def backward(self, grad_G: Tensor, out_G: Tensor, lse_G: Tensor, dq_G: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Adds to `dq_G` (this document's rows) and to the whole row's `dk` and `dv`."""
        dk_own, dv_own = torch.zeros_like(self.k), torch.zeros_like(self.v)
        for rows, keys in self._chunks():
            q, grad, out = (self._flat(x, rows) for x in (self.q_G, grad_G, out_G))
            scores, slope = self._scores(q, rows, keys)
            p = (scores - self._flat(lse_G.unsqueeze(-1), rows)).exp()
            dv_own[:, keys] += p.mT @ grad
            d_scores = p * (grad @ self.v[:, keys].mT - (grad * out).sum(-1, keepdim=True)) * slope * self.scale
            dk_own[:, keys] += d_scores.mT @ q
            dq_G[:, :, rows] += (d_scores @ self.k[:, keys]).view(*self.q_G.shape[:2], -1, q.shape[-1]).to(dq_G.dtype)
        for whole, part in ((dk, dk_own), (dv, dv_own)):
            whole[:, self.prefix] += part[:, : self.offset].to(whole.dtype)
            whole[:, self.own] += part[:, self.offset :].to(whole.dtype)

    def _chunks(self) -> Iterator[tuple[slice, slice]]:
        """Rows of the document, and the keys that any of them can see."""
        length = self.q_G.shape[2]
        for first in range(0, length, _QUERIES_AT_ONCE):
            last = min(first + _QUERIES_AT_ONCE, length)
            oldest = 0 if self.window is None else max(0, self.offset + first - self.window + 1)
            yield slice(first, last), slice(oldest, self.offset + last)

    def _scores(self, q: Tensor, rows: slice, keys: slice) -> tuple[Tensor, Tensor | float]:
        """Scores [Hkv, G * rows, keys], -inf where unseen, and the soft cap's derivative there (1 without a cap)."""
        scores, slope = q @ self.k[:, keys].mT * self.scale, 1.0
        if self.softcap is not None:
            tanh = (scores / self.softcap).tanh()
            scores, slope = tanh * self.softcap, 1 - tanh * tanh
        position = torch.arange(self.offset + rows.start, self.offset + rows.stop, device=q.device).unsqueeze(1)
        age = position - torch.arange(keys.start, keys.stop, device=q.device)
        unseen = age < 0 if self.window is None else (age < 0) | (age >= self.window)
        return scores.masked_fill(unseen.repeat(self.q_G.shape[1], 1), float("-inf")), slope

    def _flat(self, x_G: Tensor, rows: slice) -> Tensor:
        """[Hkv, G, L, D] -> [Hkv, G * rows, D]: a product over it also sums over a group's query heads."""
        return x_G[:, :, rows].flatten(1, 2).to(self.dtype)
