"""Exchanges within one group of ranks that a gradient flows through.

A tensor that every rank holds has a gradient that is either *complete* (each rank has all of it, as of what all
computed alike) or *partial* (each has a share, and the sum is the gradient). Which one comes back decides what an
exchange does in the backward pass, so each kind is a function of its own:

                    forward                               backward
    collect         all parts of a dim, end to end        own part of a complete gradient
    collect_shared  all parts of a dim, end to end        own part of the summed partial gradients
    scatter_sum     own part of the ranks' sum            all parts, end to end
    own_part        own part                              all parts, end to end
    sum_gradient    nothing                               the sum of the partial gradients
    sum_all         the ranks' sum                        nothing

Sums are taken in the tensor's dtype. It must not know what the tensors are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Exchange = Callable[[Tensor, int, dist.ProcessGroup], Tensor]

# Names that torch 2.13 gave to what it had before, and now warns of.
all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def collect(tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The ranks' parts of `dim`, end to end, of which all ranks then compute the same."""
    return _apply(tensor, dim, group, _gathered, _part)


def collect_shared(tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The ranks' parts of `dim`, end to end, of which each rank then computes its share."""
    return _apply(tensor, dim, group, _gathered, _scattered)


def scatter_sum(tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Own part of `dim` of the sum over ranks."""
    return _apply(tensor, dim, group, _scattered, _gathered)


def own_part(tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Own part of `dim` of what all ranks hold alike."""
    return _apply(tensor, dim, group, _part, _gathered)


def sum_gradient(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What all ranks hold alike, and each then computes its share of."""
    return _apply(tensor, 0, group, _same, _summed)


def sum_all(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks, of which all ranks then compute the same."""
    return _apply(tensor, 0, group, _summed, _same)


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, dim: int, group: dist.ProcessGroup, there: Exchange, back: Exchange
    ) -> Tensor:
        ctx.dim, ctx.group, ctx.back = dim, group, back
        return there(tensor, dim, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.back(grad, ctx.dim, ctx.group), None, None, None, None


def _apply(tensor: Tensor, dim: int, group: dist.ProcessGroup, there: Exchange, back: Exchange) -> Tensor:
    return _Exchanged.apply(tensor, dim, group, there, back)  # pyright: ignore[reportReturnType]


def _gathered(tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    part = tensor.movedim(dim, 0).contiguous()
    whole = part.new_empty(group.size() * part.shape[0], *part.shape[1:])
    all_gather_single(whole, part, group=group)
    return whole.movedim(0, dim)


def _scattered(tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    whole = tensor.movedim(dim, 0).contiguous()
    part = whole.new_empty(whole.shape[0] // group.size(), *whole.shape[1:])
    reduce_scatter_single(part, whole, group=group)
    return part.movedim(0, dim)


def _part(tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    return tensor.chunk(group.size(), dim)[group.rank()].clone()


def _summed(tensor: Tensor, _dim: int, group: dist.ProcessGroup) -> Tensor:
    total = tensor.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


def _same(tensor: Tensor, _dim: int, _group: dist.ProcessGroup) -> Tensor:
    return tensor.view_as(tensor)
