"""Sums whose bits do not depend on the number of ranks: `determinism: elastic`.

Floating-point addition is not associative, so a step's gradient depends on the order of its sum. Here that order is one
tree over the step's micro-batches, whoever computed them: of micro-batches 0 to 7

    ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))

With W ranks, rank r computes micro-batches r, W + r, 2W + r, ...: a round of W neighbours is summed across ranks (the
tree's lower levels, in the reduce-scatter of each backward pass), rounds are summed on each rank (`TreeSum`, the upper
levels). That needs W to be a power of two that divides the step's micro-batches. It must not know models or losses.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn

    from burnish.mesh import Mesh


class TreeReduceScatter(ReduceScatter):
    """Sums over ranks as ((0 + 1) + (2 + 3)): every rank gets all ranks' contributions to its part, and adds them
    itself. The usual reduce-scatter walks a ring, whose order depends on the part and on the number of ranks."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        parts = torch.empty_like(input_tensor)
        dist.all_to_all_single(parts, input_tensor, group=group)
        output_tensor.copy_(_tree(list(parts.chunk(group.size()))))


def _tree(parts: list[Tensor]) -> Tensor:
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def sum_in_tree(model: nn.Module) -> None:
    """Gives every sharded module of `model` the reduce-scatter of a fixed order."""
    from burnish.model.parallel import fsdp_modules

    for module in fsdp_modules(model):
        module.set_custom_reduce_scatter(TreeReduceScatter())


class TreeSum:
    """Adds up the gradients of micro-batches in a binary tree, holding about log2(n) of them.

    As a binary counter does: after micro-batches 0 to 4 it holds (0+1+2+3) and (4).
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._held: list[tuple[int, list[Tensor | None]]] = []

    def take(self) -> None:
        """Takes the gradients away from the parameters, as the next micro-batch's. One without any counts too."""
        node, level = [parameter.grad for parameter in self._parameters], 0
        for parameter in self._parameters:
            parameter.grad = None
        while self._held and self._held[-1][0] == level:
            node, level = _add(self._held.pop()[1], node), level + 1
        self._held.append((level, node))

    def give_back(self) -> None:
        """Puts the sum of all that was taken into the parameters' `grad`."""
        _, total = self._held.pop()
        while self._held:
            total = _add(self._held.pop()[1], total)
        for parameter, gradient in zip(self._parameters, total, strict=True):
            parameter.grad = gradient


def _add(left: list[Tensor | None], right: list[Tensor | None]) -> list[Tensor | None]:
    return [b if a is None else a if b is None else a.add_(b) for a, b in zip(left, right, strict=True)]


def norm_by_rows(shards: list[Tensor], mesh: Mesh) -> float:
    """Euclidean norm of all ranks' `shards` laid end to end, each of whole rows of its tensor.

    A row's squares add up the same way wherever the row lies, and the rows' sums are added up exactly rounded.
    """
    squares = [_row_squares(shard) for shard in shards if shard.numel()]
    mine = torch.cat(squares) if squares else torch.zeros(0, dtype=torch.float64)
    most = max(mesh.gather(len(mine)))
    padded = torch.zeros(most, 1, dtype=torch.float64)
    padded[: len(mine), 0] = mine
    return math.sqrt(mesh.sum_rows(padded, every_rank=True)[0])


def _row_squares(shard: Tensor) -> Tensor:
    rows = shard.detach().reshape(shard.shape[0] if shard.ndim else 1, -1)
    return rows.double().square().sum(1).cpu()
