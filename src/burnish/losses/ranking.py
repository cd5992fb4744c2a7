"""How high the model ranks what was chosen next: recall, NDCG and reciprocal rank. Measured, never minimised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, MinLen

from burnish.losses.base import Loss
from burnish.types import LossOutput

if TYPE_CHECKING:
    from burnish.types import Block, TokenOutputs
    from burnish.types import Ranking as Competitors


class Ranking(Loss):
    """Full ranking, one relevant item an event. With r = 0 the best of all items,

        recall@k = [r < k]        ndcg@k = [r < k] / log2(r + 2)        mrr = 1 / (r + 1)

    averaged over the trained tokens of the rows: the last item of each history under `part: valid` and `test`. All
    items of the vocabulary compete, never a sample of them, which would rank models differently (Krichene and Rendle,
    KDD 2020). Ties count half. Rows that are no histories rank a token among the whole vocabulary. Beside them stands,
    as the loss, the negative log-likelihood of the same tokens.
    """

    type: Literal["ranking"] = "ranking"
    needs: ClassVar[frozenset[str]] = frozenset({"ranks", "logprobs"})
    trains: ClassVar[bool] = False
    k: Annotated[list[Annotated[int, Ge(1)]], MinLen(1)] = [10]
    """Lengths of the list that a user would see."""
    exclude_seen: bool = False
    """Leave out items that stand earlier in the history, as where nothing is recommended twice."""

    def ranking(self, block: Block) -> Competitors:
        import torch

        from burnish.types import Ranking as Competitors

        if "item_start" not in block.columns:
            return Competitors(exclude_seen=self.exclude_seen)
        start, end = (int(block.columns[name].max()) for name in ("item_start", "item_end"))
        among = torch.arange(end, device=block.token_ids.device) >= start
        return Competitors(among, self.exclude_seen)

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        import torch

        assert outputs.ranks is not None and outputs.logprobs is not None
        ranks, count = outputs.ranks[block.loss_mask], self.count(block)
        gains = 1 / torch.log2(ranks + 2)
        metrics = {"mrr": ((1 / (ranks + 1)).sum(), count)}
        for k in self.k:
            metrics[f"recall@{k}"] = ((ranks < k).sum(), count)
            metrics[f"ndcg@{k}"] = ((gains * (ranks < k)).sum(), count)
        return LossOutput(-outputs.logprobs[block.loss_mask].sum(), metrics)
