"""What the attention tests share: layouts, and attention written out over the whole row with a mask, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

SHARED_PREFIX = [(0, 5, 0, 0), (5, 9, 0, 5), (9, 12, 0, 5), (13, 20, 0, 0)]
"""A prompt of 5 tokens, two completions of it, a slot of padding, a document of 7; for a row of 22 slots."""


def layout(*documents: tuple[int, int, int, int], entries: int = 6) -> Tensor:
    """int32 [entries, 4], the unused entries zero."""
    unused = [(0, 0, 0, 0)] * (entries - len(documents))
    return torch.tensor([*documents, *unused], dtype=torch.int32)


def side_by_side(*lengths: int, entries: int = 6) -> Tensor:
    """The layout of documents of these lengths, laid end to end from the row's start."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return layout(*((end - length, end, 0, 0) for end, length in zip(ends, lengths, strict=True)), entries=entries)


def visible_mask(documents: Tensor, num_tokens: int, window: int | None) -> Tensor:
    """bool [T, T]: which key (column) each query (row) sees, token by token."""
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for start, end, prefix_start, prefix_end in documents.tolist():
        history = list(range(prefix_start, prefix_end))
        for token in range(start, end):
            history.append(token)
            mask[token, history if window is None else history[-window:]] = True
    return mask


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Every score of the row, masked, with a softmax over all of it."""
    num_heads, num_tokens, _ = q.shape
    k, v = (x.repeat_interleave(num_heads // x.shape[0], 0) for x in (k, v))
    mask = visible_mask(documents, num_tokens, window)
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, num_tokens, 1)], -1)
    # Rows of padding see nothing: a softmax of -inf alone is NaN, in the gradient too, so they get a finite score.
    padding = ~mask.any(1, keepdim=True)
    probabilities = torch.softmax(scores.masked_fill(padding, 0.0), -1).masked_fill(padding, 0.0)
    return probabilities[..., :num_tokens] @ v
