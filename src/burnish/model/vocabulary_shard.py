"""The rows of a head that one rank holds, and what is summed over ranks so that no rank ever holds all logits.

A rank computes logits [c, V/n] of its own rows. A softmax needs their largest and the sum of their exponentials over
all ranks; a token's own logit is on one rank, and the others say 0. Without other ranks every method is the plain
operation, on the same bits. It must not know losses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from burnish.model.collectives import all_gather_single, sum_all, sum_gradient


@dataclass(frozen=True, slots=True)
class VocabularyShard:
    """Rows `first`, `first + 1`, ... of the head; the ranks of `group` have the others, equally many each."""

    first: int = 0
    group: dist.ProcessGroup | None = None
    """None: all rows are here."""

    def num_tokens(self, vocab_size: int, weight: Tensor) -> int:
        """How many of this rank's rows in `weight` stand for tokens; those after them are padding."""
        here = min(vocab_size - self.first, weight.shape[0])
        assert here > 0, f"rows from {self.first} on are all padding of {vocab_size} tokens"
        return here

    def enter(self, hidden_nH: Tensor) -> Tensor:
        """What each rank multiplies with its own rows: the gradient is the sum of the ranks' shares."""
        return hidden_nH if self.group is None else sum_gradient(hidden_nH, self.group)

    def total(self, shares: Tensor) -> Tensor:
        """The sum of the ranks' shares, differentiable."""
        return shares if self.group is None else sum_all(shares, self.group)

    def max(self, z_cV: Tensor) -> Tensor:
        """[c, 1]: the largest over all rows."""
        top_c1 = z_cV.amax(1, keepdim=True)
        if self.group is not None:
            dist.all_reduce(top_c1, dist.ReduceOp.MAX, group=self.group)
        return top_c1

    def sum(self, *shares: Tensor) -> tuple[Tensor, ...]:
        """Each of them, [c] or [c, k], summed over ranks: one exchange for all. Not differentiable."""
        if self.group is None:
            return shares
        flat = torch.cat([share.reshape(-1) for share in shares])
        dist.all_reduce(flat, group=self.group)
        parts = flat.split([share.numel() for share in shares])
        return tuple(part.view_as(share) for part, share in zip(parts, shares, strict=True))

    def logsumexp(self, z_cV: Tensor) -> Tensor:
        """[c, 1]: over all rows."""
        if self.group is None:
            return z_cV.logsumexp(1, keepdim=True)
        top_c1 = self.max(z_cV)
        (sums_c1,) = self.sum((z_cV - top_c1).exp_().sum(1, keepdim=True))
        return sums_c1.log_().add_(top_c1)

    def pick(self, z_cV: Tensor, ids_cK: Tensor) -> Tensor:
        """[c, K]: entries at ids, 0 for those that are not here."""
        if self.group is None:
            return z_cV.gather(1, ids_cK)
        place, here = self._places(ids_cK, z_cV.shape[1])
        return z_cV.gather(1, place).masked_fill_(~here, 0.0)

    def add(self, z_cV: Tensor, ids_cK: Tensor, values_cK: Tensor) -> Tensor:
        """Adds values at those ids that are here, in place."""
        if self.group is None:
            return z_cV.scatter_add_(1, ids_cK, values_cK)
        place, here = self._places(ids_cK, z_cV.shape[1])
        return z_cV.scatter_add_(1, place, values_cK.masked_fill(~here, 0.0))

    def exclude(self, z_cV: Tensor, ids_cK: Tensor) -> Tensor:
        """Makes the logits of those ids that are here -inf, in place."""
        if self.group is None:
            return z_cV.scatter_(1, ids_cK, -torch.inf)
        place, here = self._places(ids_cK, z_cV.shape[1])
        bounds = torch.where(here, -torch.inf, torch.inf).to(z_cV.dtype)
        return z_cV.scatter_reduce_(1, place, bounds, "amin")

    def rows(self, table: Tensor, ids_U: Tensor) -> Tensor:
        """[U, ...]: rows of a weight or bias, 0 for those that are not here. Differentiable."""
        if self.group is None:
            return table.index_select(0, ids_U)
        place, here = self._places(ids_U, table.shape[0])
        return table.index_select(0, place) * here.view(-1, *[1] * (table.ndim - 1))

    def topk(self, z_cV: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest of all rows, largest first, and their ids: [c, k] both."""
        if self.group is None:
            values, ids = z_cV.topk(k)
            return values, ids
        size = self.group.size()
        values, ids = z_cV.topk(min(k, z_cV.shape[1]))
        # Ranks have different numbers of rows that are no padding, and an exchange wants equal shapes.
        own = z_cV.new_full((2, k, z_cV.shape[0]), -torch.inf)
        own[0, : values.shape[1]], own[1, : values.shape[1]] = values.t(), (ids + self.first).t()
        found = own.new_empty(size, *own.shape)
        all_gather_single(found.view(-1, *own.shape[1:]), own, group=self.group)
        best, place = found[:, 0].reshape(size * k, -1).t().topk(k)
        return best, found[:, 1].reshape(size * k, -1).t().gather(1, place).long()

    def _places(self, ids: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """(where ids are among this rank's rows, whether they are)."""
        place = ids - self.first
        return place.clamp(0, num_rows - 1), (place >= 0) & (place < num_rows)


WHOLE = VocabularyShard()
"""All rows are on this rank."""
