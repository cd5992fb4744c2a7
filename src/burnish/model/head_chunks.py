"""One chunk of a language-model head: its logits, and the sums of its gradients over chunks.

It knows scales, caps and padding of the vocabulary, which of its rows are here, and in which dtype sums are taken. It
must not know losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from burnish.model.vocabulary_shard import WHOLE, VocabularyShard


@dataclass(frozen=True, slots=True)
class Head:
    """logits = cap(logit_scale * (h W^T + b)) / temperature over the first `vocab_size` rows of W that are here."""

    vocab_size: int
    softcap: float | None
    logit_scale: float
    temperature: float
    chunk: int
    shard: VocabularyShard = WHOLE
    """Which rows those are."""

    def slices(self, num_tokens: int) -> Iterator[slice]:
        """Chunks of nearly equal size: 410 tokens by 256 are 205 + 205, whose peak is below that of 256 + 154."""
        count = -(-num_tokens // self.chunk)
        for i in range(count):
            yield slice(num_tokens * i // count, num_tokens * (i + 1) // count)

    def buffer(self, hidden_nH: Tensor, parts: int) -> Tensor:
        """Memory [parts, c, V] for the largest chunk, in the dtype of reductions: float32, float64 for float64."""
        longest = max((s.stop - s.start for s in self.slices(hidden_nH.shape[0])), default=0)
        return torch.empty(parts, longest, self.vocab_size, dtype=wide_dtype(hidden_nH), device=hidden_nH.device)

    def logits(
        self, hidden_cH: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [c, V] of a chunk, written to `out`; and d logits / d (h W^T + b) where that is not a constant."""
        weight, out = weight[: self.vocab_size], out[: hidden_cH.shape[0]]
        if weight.dtype == out.dtype:
            torch.mm(hidden_cH, weight.t(), out=out)
        else:
            out.copy_(torch.mm(hidden_cH, weight.t()))
        if bias is not None:
            out.add_(bias[: self.vocab_size])
        if self.softcap is None:
            if self.slope != 1.0:
                out.mul_(self.slope)
            return out, None
        out.mul_(self.logit_scale / self.softcap).tanh_()
        slope = out.square().neg_().add_(1.0).mul_(self.slope)
        return out.mul_(self.softcap / self.temperature), slope

    @property
    def slope(self) -> float:
        """d logits / d (h W^T + b), but for the cap."""
        return self.logit_scale / self.temperature


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """In which sums over the vocabulary and over tokens are taken: float32, float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


class HeadGradients:
    """Sums a head's gradients over chunks: dW and db in float32 whatever the weights are in, and dH row by row."""

    def __init__(self, hidden_nH: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, bool, bool]) -> None:
        self.wide = wide_dtype(weight)
        self.hidden = torch.empty_like(hidden_nH) if wanted[0] else None
        self.weight = torch.zeros_like(weight, dtype=self.wide) if wanted[1] else None
        self.bias = torch.zeros_like(bias, dtype=self.wide) if bias is not None and wanted[2] else None

    def add(self, rows: slice, hidden_cH: Tensor, weight: Tensor, slope: Tensor | float, grad_cV: Tensor) -> None:
        """Adds one chunk, given d loss / d logits; `grad_cV` is spent."""
        vocab_size = grad_cV.shape[1]
        if not isinstance(slope, float) or slope != 1.0:
            grad_cV.mul_(slope)
        narrow = grad_cV.to(weight.dtype)
        if self.hidden is not None:
            torch.mm(narrow, weight[:vocab_size], out=self.hidden[rows])
        if self.bias is not None:
            self.bias[:vocab_size].add_(grad_cV.sum(0))
        if self.weight is None:
            return
        total = self.weight[:vocab_size]  # accumulated in place: a [V, H] temporary a chunk would outweigh the logits
        if narrow.dtype == self.wide:
            torch.addmm(total, narrow.t(), hidden_cH, out=total)
        elif total.is_cuda:
            torch.addmm(total, narrow.t(), hidden_cH, out_dtype=self.wide, out=total)  # pyright: ignore[reportCallIssue]
        else:
            torch.addmm(total, grad_cV.t(), hidden_cH.to(self.wide), out=total)

    def result(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dH, dW, db) in the dtypes of what they are gradients of."""
        narrow_weight = None if self.weight is None else self.weight.to(weight.dtype)
        narrow_bias = None if self.bias is None or bias is None else self.bias.to(bias.dtype)
        return self.hidden, narrow_weight, narrow_bias
