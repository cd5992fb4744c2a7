"""The module behind heads that score tokens: one matrix over the last hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from burnish.model.seeded import generator

if TYPE_CHECKING:
    from burnish.types import Block


class Scores(nn.Linear):
    """W h in float32, without a bias: the `score` of transformers' `...ForSequenceClassification`."""

    @classmethod
    def drawn(cls, hf_config: Any, num_outputs: int, *, name: str, seed: int) -> Scores:
        """Normal with the model's own `initializer_range` (0.02 where it has none), as transformers draws it."""
        text_config = hf_config.get_text_config()
        scores = cls(text_config.hidden_size, num_outputs, bias=False, dtype=torch.float32, device="cpu")
        std = getattr(text_config, "initializer_range", None) or 0.02
        with torch.no_grad():
            scores.weight.normal_(0.0, std, generator=generator(seed, f"{name}.weight"))
        return scores

    def forward(self, hidden_TH: Tensor, block: Block, reads_T: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[T, L] float32: the scores of the tokens that are read, 0 at the others."""
        read_n = torch.nonzero(reads_T).squeeze(1)
        scores_nL = linear(hidden_TH.index_select(0, read_n).to(self.weight.dtype), self.weight)
        return scores_nL.new_zeros(reads_T.shape[0], self.out_features).index_copy(0, read_n, scores_nL)
