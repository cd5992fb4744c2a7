"""From the groups of a step to packed rows: every rank packs all of them in the same way, and takes its share.

What is known of each sampled token (advantage, log-probability) is a vector over the A sampled tokens of the step, laid
end to end in the groups' order; the column `place` of a row says where each of its tokens is in there, so a vector goes
into rows and comes back out of them by one indexing operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from burnish.advantages.base import Scored
from burnish.data.packing.base import max_documents
from burnish.data.packing.best_fit import best_fit_decreasing
from burnish.data.packing.layout import empty_block, layout, sizes
from burnish.types import Block, Group, Sample

if TYPE_CHECKING:
    from burnish.mesh import Mesh
    from burnish.policy.policy import Policy
    from burnish.rollouts import Rollout, RolloutGroup


@dataclass(frozen=True, slots=True)
class Layout:
    """How rollouts are laid into rows."""

    row_length: int
    share_prompts: bool
    """Rollouts of one prompt in one row stand behind one copy of it, which is computed once."""
    one_a_row: bool
    """For models whose documents would see each other."""

    @property
    def num_documents(self) -> int:
        """Entries of a row."""
        return max_documents(self.row_length)


class Batch:
    """A step's rollouts as rows of this rank, one list for each minibatch.

    Args:
        groups: all of the step, the same on every rank.
        version: of the policy that trains on them.
    """

    def __init__(
        self,
        groups: Sequence[RolloutGroup],
        layout: Layout,
        mesh: Mesh,
        *,
        version: int,
        num_minibatches: int = 1,
    ) -> None:
        self.groups, self.layout, self.mesh, self.version = groups, layout, mesh, version
        self.rollouts = [rollout for group in groups for rollout in group.rollouts]
        self.lengths = torch.tensor([rollout.num_sampled for rollout in self.rollouts], dtype=torch.int64)
        self.num_tokens = int(self.lengths.sum())
        """Sampled tokens of the step: A."""
        self._written: dict[str, Tensor] = {}
        starts = np.cumsum([0, *self.lengths.tolist()])
        self.minibatches: list[list[Block]] = []
        self._trains = [True] * len(self.rollouts)
        self._bounds, first = [0], 0
        shares = np.array_split(np.arange(len(groups)), min(num_minibatches, max(len(groups), 1)))
        for share in shares:
            packed: list[Group] = []
            for index in share:
                packed += self._packed(groups[index], starts[first:])
                first += len(groups[index].rollouts)
            self.minibatches.append(self._own_rows(packed))
            self._bounds.append(first)

    @property
    def blocks(self) -> list[Block]:
        """This rank's rows of all minibatches."""
        return [block for blocks in self.minibatches for block in blocks]

    def leave_out_truncated(self) -> None:
        """From now on, rollouts that were cut off at their limit are not trained; what was read of them stands."""
        self.minibatches = [
            [replace(block, loss_mask=block.loss_mask & block.columns["whole"].bool()) for block in blocks]
            for blocks in self.minibatches
        ]
        self._trains = [rollout.finish_reason == "stop" for rollout in self.rollouts]

    def num_trained(self, minibatch: int) -> int:
        """Sampled tokens that are trained in a minibatch, over all ranks."""
        mine = range(self._bounds[minibatch], self._bounds[minibatch + 1])
        return sum(self.rollouts[i].num_sampled for i in mine if self._trains[i])

    def scored(self, penalties: Tensor | None = None, values: Tensor | None = None) -> Scored:
        """What advantages are made of."""
        numbers = [i for i, group in enumerate(self.groups) for _ in group.rollouts]
        return Scored(
            rewards=torch.tensor([rollout.reward for rollout in self.rollouts], dtype=torch.float64),
            groups=torch.tensor(numbers, dtype=torch.int64),
            lengths=self.lengths,
            penalties=penalties,
            values=values,
        )

    def advantage_of(self, rollout: Rollout) -> float | None:
        """Mean over its tokens; None before advantages were written, and where it has no token."""
        if "advantages" not in self._written or not rollout.num_sampled:
            return None
        number = next(i for i, other in enumerate(self.rollouts) if other is rollout)
        start = int(self.lengths[:number].sum())
        return float(self._written["advantages"][start : start + rollout.num_sampled].mean())

    def write(self, name: str, values_A: Tensor) -> None:
        """Gives every row the column `name`, float32 [T]: each sampled token's value, 0 elsewhere."""
        self._written[name] = values_A
        padded = torch.cat([torch.zeros(1), values_A.float()])
        self._map(lambda block: {name: padded[block.columns["place"]]})

    def write_rows(self, name: str, columns: list[Tensor]) -> None:
        """Gives every row of this rank a column [T] of its own, in the order of `blocks`."""
        given = iter(columns)
        self._map(lambda block: {name: next(given)})

    def read_column(self, name: str) -> Tensor:
        """float64 [A] of a column [T] that all rows have."""
        return self.read([block.columns[name] for block in self.blocks])

    def annotate(self, policy: Policy, *names: str) -> None:
        """Asks the policy's second model for columns."""
        asked = iter(policy.asked(self.blocks, frozenset(names)))
        self.minibatches = [[next(asked) for _ in blocks] for blocks in self.minibatches]

    def read(self, columns: list[Tensor]) -> Tensor:
        """float64 [A] of every rank's sampled tokens, from a [T] vector for each of this rank's rows."""
        flat = torch.zeros(self.num_tokens + 1, dtype=torch.float64)
        for block, column_T in zip(self.blocks, columns, strict=True):
            flat[block.columns["place"]] = column_T.double()
        flat[0] = 0.0
        return torch.stack(self.mesh.gather_tensor(flat)).sum(0)[1:]  # each token is in one row of one rank

    def _map(self, columns: Callable[[Block], dict[str, Tensor]]) -> None:
        self.minibatches = [
            [replace(block, columns=block.columns | columns(block)) for block in blocks] for blocks in self.minibatches
        ]

    def _packed(self, group: RolloutGroup, starts: np.ndarray) -> list[Group]:
        """Groups of samples that fit into a row each: rollouts behind one copy of their prompt, or one by one."""
        found, open_, room = [], [], 0
        prompt = np.array(group.prompt.token_ids, np.int32)
        for i, rollout in enumerate(group.rollouts):
            if not rollout.num_sampled:
                continue
            sample = self._sample(group, rollout, int(starts[i]))
            if not self.layout.share_prompts:
                found.append(Group((sample,)))
                continue
            behind = replace(_tail(sample, len(prompt)), prefix=0)
            if not open_ or len(behind) > room or len(open_) == self.layout.num_documents:
                found += [Group(tuple(open_))] if open_ else []
                open_ = [_tail(sample, 0, len(prompt))]
                room = self.layout.row_length - len(prompt)
            open_.append(behind)
            room -= len(behind)
        return found + ([Group(tuple(open_))] if open_ else [])

    def _sample(self, group: RolloutGroup, rollout: Rollout, start: int) -> Sample:
        mask = np.array(rollout.loss_mask)
        place = np.zeros(len(mask), np.int64)
        place[mask] = np.arange(start + 1, start + 1 + mask.sum())
        return Sample(
            token_ids=np.array(rollout.token_ids, np.int32),
            loss_mask=mask,
            sample_id=group.prompt.where,
            columns={
                "place": place,
                "whole": np.full(len(mask), rollout.finish_reason == "stop", np.float32),
                "rollout_logprobs": np.array(rollout.logprobs, np.float32),
                "lag": np.array(self.version - rollout.oldest_version, np.float32),
            },
        )

    def _own_rows(self, packed: list[Group]) -> list[Block]:
        """This rank's rows of a minibatch, as many as every other rank has."""
        layout_, ranks = self.layout, self.mesh.sizes.data
        if layout_.one_a_row:
            rows = [[i] for i in range(len(packed))]
        else:
            rows = best_fit_decreasing(sizes(packed), layout_.row_length)
        made = [layout([packed[i] for i in row], layout_.row_length, layout_.num_documents) for row in rows]
        spare = empty_block(layout_.row_length, layout_.num_documents, made[0].columns if made else self._columns())
        made += [spare] * (max(1, -(-len(made) // ranks)) * ranks - len(made))
        return made[self.mesh.data_rank :: ranks]

    def _columns(self) -> dict[str, Tensor]:
        """Of a step in which nothing was sampled."""
        tokens, documents = self.layout.row_length, self.layout.num_documents
        return {
            "place": torch.zeros(tokens, dtype=torch.int64),
            "whole": torch.zeros(tokens),
            "rollout_logprobs": torch.zeros(tokens),
            "lag": torch.zeros(documents),
        }


def _tail(sample: Sample, start: int, end: int | None = None) -> Sample:
    """Tokens `start` to `end` of a sample."""
    columns = {name: value if value.ndim == 0 else value[start:end] for name, value in sample.columns.items()}
    return replace(
        sample, token_ids=sample.token_ids[start:end], loss_mask=sample.loss_mask[start:end], columns=columns
    )
