"""The module of the `embedding` head: hidden states of packed documents to one vector each."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from burnish.model.head_chunks import wide_dtype
from burnish.model.seeded import generator

if TYPE_CHECKING:
    from burnish.model.heads.embedding import Embedding
    from burnish.types import Block


class Pooled(nn.Module):
    """Pools, maps and normalises, in float32 whatever the hidden states are in.

    Args:
        hidden_size: length H of a hidden state.
        name: the module's name in its model; with `seed` it decides the weights.
    """

    def __init__(self, config: Embedding, hidden_size: int, *, name: str, seed: int) -> None:
        super().__init__()
        self.config = config
        self.weight: nn.Parameter | None = None
        """[E, H], where vectors have a length of their own."""
        if config.dimensions is not None:
            bound = 1 / math.sqrt(hidden_size)  # as torch's own linear layers
            drawn = torch.empty(config.dimensions, hidden_size, dtype=torch.float32, device="cpu")
            drawn.uniform_(-bound, bound, generator=generator(seed, f"{name}.weight"))
            self.weight = nn.Parameter(drawn)

    def forward(self, hidden_TH: Tensor, block: Block, reads_T: Tensor) -> Tensor:
        """[D, E] float32, 0 for unused entries. `reads_T` is not looked at: every token of a document is pooled."""
        pooled_DH = (last_states if self.config.pooling == "last" else mean_states)(hidden_TH, block)
        made = pooled_DH if self.weight is None else pooled_DH @ self.weight.to(pooled_DH.dtype).t()
        return nn.functional.normalize(made, dim=1) if self.config.normalize else made


def last_states(hidden_TH: Tensor, block: Block) -> Tensor:
    """[D, H] the hidden state of each document's last token."""
    start, end = block.documents[:, 0].long(), block.documents[:, 1].long()
    states = hidden_TH[(end - 1).clamp(min=0)].to(wide_dtype(hidden_TH))
    return states * (end > start).unsqueeze(1)


def mean_states(hidden_TH: Tensor, block: Block) -> Tensor:
    """[D, H] the mean over each document's own tokens."""
    length = (block.documents[:, 1] - block.documents[:, 0]).clamp(min=1).unsqueeze(1)
    hidden_TH = hidden_TH.to(wide_dtype(hidden_TH)) * (block.document_ids >= 0).unsqueeze(1)
    total = hidden_TH.new_zeros(block.documents.shape[0], hidden_TH.shape[1])
    return total.index_add(0, block.document_ids.clamp(min=0), hidden_TH) / length
