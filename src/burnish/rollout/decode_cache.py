"""Keys and values of the sequences that are being sampled, and attention over them.

Every sequence has a slot. A forward pass gets one row: first the next token of each slot that is being sampled, then
stretches of prompts that are yet to be read. The former attend together, slots beside each other as one batch, padded
to their longest; the latter by `document_attention`, with what their slot holds as a prefix. It must not know requests
or how tokens are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from burnish.model.attention import Kernel, document_attention

_GROWTH = 128
"""Tokens by which slots grow at least."""
_CALL_KEYS = 400
"""What one more call costs, in keys of padding that are attended to in vain: 25 us, at 0.06 us a key (32 slots, two
key heads of width 64, one core with AVX-512)."""


class Feed(NamedTuple):
    """Tokens of a sequence that a forward pass runs."""

    slot: int
    start: int
    """Place of the first of them in the sequence; what is before it has been run."""
    token_ids: list[int]


class Run(NamedTuple):
    """Neighbouring slots that attend in one call."""

    rows: slice
    """Their tokens in the row."""
    first: int
    """Their first slot."""
    lengths: list[int]
    """Keys of each, with the one of this pass."""


class Cache:
    """Keys and values of `num_slots` sequences, [Hkv, slots * length, D] for each layer; made as they are written."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots, self.length = num_slots, 0
        self._layers: list[tuple[Tensor, Tensor]] = []

    def reserve(self, length: int) -> None:
        """Makes room for sequences of so many tokens; what is held stays."""
        if length <= self.length:
            return
        length = -(-max(length, self.length * 3 // 2) // _GROWTH) * _GROWTH
        for index, layer in enumerate(self._layers):
            self._layers[index] = (self._grown(layer[0], length), self._grown(layer[1], length))
        self.length = length

    def _grown(self, old: Tensor, length: int) -> Tensor:
        new = old.new_zeros(old.shape[0], self.num_slots, length, old.shape[2])
        new[:, :, : self.length] = old.view(old.shape[0], self.num_slots, self.length, old.shape[2])
        return new.flatten(1, 2)

    def copy(self, source: int, target: int, count: int) -> None:
        """Gives a slot the first `count` tokens of another one."""
        for layer in self._layers:
            for held in layer:
                slots = held.view(held.shape[0], self.num_slots, self.length, held.shape[2])
                slots[:, target, :count] = slots[:, source, :count]

    def layer(self, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, whose tokens' are like `k` and `v`, [Hkv, T, D]."""
        if index == len(self._layers):
            tokens = self.num_slots * self.length
            # Zeros, since a slot that was never written is padding to its neighbours, and 0 * NaN is NaN.
            self._layers.append(
                (k.new_zeros(k.shape[0], tokens, k.shape[2]), v.new_zeros(v.shape[0], tokens, v.shape[2]))
            )
        return self._layers[index]

    def clear(self) -> None:
        """Gives the memory back."""
        self._layers, self.length = [], 0


class Pass:
    """One forward pass over `feeds`, those of one token first, each part in the order of the slots: the `decoding=` of
    the model's forward."""

    def __init__(self, cache: Cache, feeds: Sequence[Feed], device: torch.device) -> None:
        self.cache = cache
        cache.reserve(max(feed.start + len(feed.token_ids) for feed in feeds))
        positions = [range(feed.start, feed.start + len(feed.token_ids)) for feed in feeds]
        self.token_ids = torch.tensor([i for feed in feeds for i in feed.token_ids], device=device)
        self.position_ids = torch.tensor([i for places in positions for i in places], device=device)
        self._places = torch.tensor(
            [feed.slot * cache.length + i for feed, places in zip(feeds, positions, strict=True) for i in places],
            device=device,
        )
        singles = [feed for feed in feeds if len(feed.token_ids) == 1]
        assert singles == list(feeds[: len(singles)]), "feeds of one token come first"
        self._runs = runs(singles)
        self._stretches: list[tuple[slice, Feed]] = []
        row = len(singles)
        for feed in feeds[len(singles) :]:
            self._stretches.append((slice(row, row + len(feed.token_ids)), feed))
            row += len(feed.token_ids)
        self._next_layer = 0
        self._masks: dict[tuple[int, int | None], tuple[int, Tensor | None]] = {}

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
        kernel: Kernel,
    ) -> Tensor:
        """See `model.attention.Decoding`."""
        keys, values = self.cache.layer(self._next_layer, k, v)
        self._next_layer += 1
        keys.index_copy_(1, self._places, k)
        values.index_copy_(1, self._places, v)
        slots = (self.cache.num_slots, self.cache.length)
        keys, values = keys.unflatten(1, slots), values.unflatten(1, slots)
        groups = (k.shape[0], q.shape[0] // k.shape[0])
        out = q.new_empty(q.shape[1], q.shape[0], v.shape[2]).transpose(0, 1)
        out_G, q_G = out.unflatten(0, groups), q.unflatten(0, groups)
        sinks_G = None if sinks is None else sinks.unflatten(0, groups)
        for index, run in enumerate(self._runs):
            oldest, mask = self._mask(index, window, q)
            among = (slice(None), slice(run.first, run.first + len(run.lengths)), slice(oldest, max(run.lengths)))
            k_S, v_S = keys[among].transpose(0, 1), values[among].transpose(0, 1)
            q_S = q_G[:, :, run.rows].permute(2, 0, 1, 3)
            if softcap is None and sinks is None:
                part = scaled_dot_product_attention(q_S, k_S, v_S, attn_mask=mask, scale=scale)
            else:
                part = _written_out(q_S, k_S, v_S, mask, scale, softcap, sinks_G)
            out_G[:, :, run.rows] = part.permute(1, 2, 0, 3)
        for rows, feed in self._stretches:
            end = feed.start + len(feed.token_ids)
            out[:, rows] = document_attention(
                q[:, rows],
                keys[:, feed.slot, :end],
                values[:, feed.slot, :end],
                torch.tensor([[feed.start, end, 0, feed.start]], dtype=torch.int32),
                scale=scale,
                window=window,
                softcap=softcap,
                sinks=sinks,
                kernel=kernel,
                first=feed.start,
            )
        return out

    def _mask(self, index: int, window: int | None, like: Tensor) -> tuple[int, Tensor | None]:
        """The oldest key that a run sees, and [n, 1, 1, L] to be added to its scores from there on; None: all are seen.
        The same for all layers of a window."""
        if (index, window) not in self._masks:
            lengths = self._runs[index].lengths
            shortest, longest = min(lengths), max(lengths)
            oldest = 0 if window is None else max(0, shortest - window)
            mask = None
            if shortest < longest:
                ends = torch.tensor(lengths, device=like.device).unsqueeze(1)
                keys = torch.arange(oldest, longest, device=like.device)
                unseen = keys >= ends if window is None else (keys >= ends) | (keys < ends - window)
                mask = like.new_zeros(unseen.shape).masked_fill_(unseen, float("-inf"))[:, None, None]
            self._masks[index, window] = (oldest, mask)
        return self._masks[index, window]


def runs(feeds: Sequence[Feed]) -> list[Run]:
    """Slots that attend in one call: neighbours, unless padding them to one length costs more than a further call.

    >>> [(run.first, run.lengths) for run in runs([Feed(0, 9, [5]), Feed(1, 7, [5]), Feed(2, 4999, [5])])]
    [(0, [10, 8]), (2, [5000])]
    """
    found: list[Run] = []
    for row, feed in enumerate(feeds):
        length = feed.start + 1
        if found and found[-1].first + len(found[-1].lengths) == feed.slot:
            rows, first, lengths = found[-1]
            longest = max(lengths)
            padded = (len(lengths) + 1) * max(longest, length)
            if padded <= len(lengths) * longest + length + _CALL_KEYS:
                found[-1] = Run(slice(rows.start, row + 1), first, [*lengths, length])
                continue
        found.append(Run(slice(row, row + 1), feed.slot, [length]))
    return found


def _written_out(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """One query a sequence, `q` [n, Hkv, G, Dk] over `k` [n, Hkv, L, Dk] and `v`, with scores in float32 at least; a
    sink [Hkv, G] stands in the softmax's denominator."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).mT * scale
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(-1, keepdim=True)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(wide).unsqueeze(-1))
    return ((scores - lse).exp() @ v.to(wide)).to(q.dtype)
