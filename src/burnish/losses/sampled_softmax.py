"""Next item against a sample of the others: a softmax whose cost does not grow with the catalogue."""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge

from burnish.losses.base import Loss
from burnish.types import LossOutput

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.types import Block, RowKind, TokenOutputs


class SampledSoftmax(Loss):
    """-log exp(z_y) / (exp(z_y) + sum over j with c_j != y of exp(z_{c_j}) / (K q_{c_j})), with z the logits, y the
    item and c_1..c_K negatives drawn with replacement from q: the sum is then an unbiased estimate of the softmax's.

    Bengio and Senecal, "Adaptive importance sampling to accelerate training of a neural probabilistic language model",
    IEEE TNN 2008; the correction of logits by -log(K q) as in Yi et al., RecSys 2019. One sample serves all tokens of a
    micro-batch, a function of `seed` and of its tokens, so that a resumed run draws the same.
    """

    type: Literal["sampled_softmax"] = "sampled_softmax"
    needs: ClassVar[frozenset[str]] = frozenset({"candidate_logits"})
    rows: ClassVar[RowKind] = "history"
    num_negatives: Annotated[int, Ge(1)] = 1024
    """K. From the number of items on, each item is a candidate once, and this is the full softmax over items."""
    negatives: Literal["uniform", "log_uniform"] = "uniform"
    """q: the same for all items; or log((r + 2) / (r + 1)) / log(n + 1) for the item in place r of n, about
    proportional to popularity where the most frequent items come first, as in a vocabulary that was learned."""
    seed: int = 0
    """Of the draw, with the tokens of the micro-batch."""

    def candidates(self, block: Block) -> Tensor:
        import torch

        start, count = _items(block)
        if self.num_negatives >= count:
            places = torch.arange(count)
        else:
            content = zlib.crc32(block.token_ids.cpu().numpy().tobytes(), self.seed & 0xFFFFFFFF)
            uniform = torch.rand(
                self.num_negatives, generator=torch.Generator().manual_seed(content), dtype=torch.float64
            )
            # The inverse of the cumulative distribution: floor(u n), or floor((n + 1)^u) - 1.
            drawn = uniform * count if self.negatives == "uniform" else (count + 1) ** uniform - 1
            places = drawn.long().clamp(max=count - 1)
        return (start + places).to(block.token_ids.device)

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        import torch

        logits = outputs.candidate_logits
        assert logits is not None
        candidates_K = self.candidates(block)
        negatives_TK = logits[:, 1:] - self._log_expected(candidates_K, block)
        negatives_TK = negatives_TK.masked_fill(candidates_K == block.token_ids[:, None], -torch.inf)
        loss_T = torch.cat([logits[:, :1], negatives_TK], 1).logsumexp(1) - logits[:, 0]
        total = loss_T[block.loss_mask].sum()
        return LossOutput(total, {"loss": (total.detach(), self.count(block))})

    def _log_expected(self, candidates_K: Tensor, block: Block) -> Tensor | float:
        """log(K q) of each candidate: how often it is expected in the sample."""
        start, count = _items(block)
        if self.num_negatives >= count:
            return 0.0
        if self.negatives == "uniform":
            return math.log(self.num_negatives / count)
        places_K = (candidates_K - start).double()
        chance_K = ((places_K + 2) / (places_K + 1)).log() / math.log(count + 1)
        return (self.num_negatives * chance_K).log().float()


def _items(block: Block) -> tuple[int, int]:
    """(first id, number) of the items, which histories' renderer writes beside each document."""
    start = int(block.columns["item_start"].max())
    return start, int(block.columns["item_end"].max()) - start
