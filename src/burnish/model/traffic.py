"""What ranks exchange, in bytes that reach one of them: counted as it happens, and predicted from the shards.

Of n ranks, S bytes gathered or reduced-and-scattered are S (n - 1) / n that reach each rank, and an all-reduce is twice
that: what the best algorithms move, rings among them. It must not know models or recipes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from burnish.mesh import Mesh

Exchanges = Counter[tuple[str, str]]
"""(axis, kind) -> bytes that reach a rank."""

KINDS = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "alltoall_base_": "all-to-all",
}


def reduced(num_bytes: float, ranks: int) -> int:
    """Bytes that reach each rank of an all-reduce of a tensor."""
    return round(2 * num_bytes * (ranks - 1) / ranks)


def axes(mesh: Mesh) -> dict[str, str]:
    """Name of each group of ranks that this rank is in -> the axis of the mesh that it is; FSDP's is `shard`. Where
    `cp` is all there is to shard over, torch has one group for both, and it is `cp`."""
    shard = mesh.fsdp_mesh()
    named = {"shard": shard.get_group(shard.ndim - 1)}
    named |= {axis: mesh.device_mesh[axis].get_group() for axis in ("dp_replicate", "cp", "tp")}
    return {group.group_name: axis for axis, group in named.items()}


class CountExchanges(TorchDispatchMode):
    """Inside it, collectives are counted in `seen`.

    Args:
        axes: see `axes`; a group without a name there is `others`.
    """

    def __init__(self, axes: Mapping[str, str]) -> None:
        super().__init__()
        self.axes, self.seen = axes, Exchanges()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d" and (kind := KINDS.get(func._opname)) is not None:
            group = _group(args)
            self.seen[self.axes.get(group.group_name, "others"), kind] += _reaching(kind, args, group.size())
        return out


def _reaching(kind: str, args: tuple[Any, ...], ranks: int) -> int:
    if kind == "all-reduce":
        return reduced(_nbytes(args[0]), ranks)
    into, what = _nbytes(args[0]), _nbytes(args[1])
    return {"all-gather": into - what, "reduce-scatter": what - into, "all-to-all": into - into // ranks}[kind]


def _nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in pytree.tree_leaves(tensors))


def _group(args: tuple[Any, ...]) -> dist.ProcessGroup:
    # The first of an operator's objects; one that follows is the kind of sum.
    return dist.ProcessGroup.unbox(next(part for part in args if isinstance(part, torch.ScriptObject)))
