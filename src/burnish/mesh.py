"""The ranks of a run, how they are laid out, and the device they compute on.

One path for one process and for many: a single process is a process group of one, opened over an in-memory store, so no
port is bound and two runs on a machine never meet. Under torchrun, a supervisor or SLURM the same call joins the group
that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe. This module must not know models or data.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from burnish.mesh_config import MeshConfig, Sizes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")

COLLECTIVE_SECONDS = 600.0
"""Longest that a rank waits for the others in one exchange: no wait is unbounded."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """This process's place among the ranks."""

    device: torch.device
    rank: int
    world_size: int
    sizes: Sizes
    device_mesh: DeviceMesh
    """Axes dp_replicate, dp_shard, cp, tp, outermost first."""
    host_group: dist.ProcessGroup | None = None
    """All ranks, over gloo: for what is on the CPU. None: the default group."""

    @property
    def data_rank(self) -> int:
        """Whose share of a step's rows this rank has, of `sizes.data`; the ranks of one tp x cp group share theirs."""
        return self.rank // (self.sizes.cp * self.sizes.tp)

    def axis_rank(self, axis: Literal["dp_replicate", "dp_shard", "cp", "tp"]) -> int:
        """This rank's place along one axis."""
        inner = self.sizes[Sizes._fields.index(axis) + 1 :]
        stride = 1
        for size in inner:
            stride *= size
        return self.rank // stride % getattr(self.sizes, axis)

    @property
    def tp_group(self) -> dist.ProcessGroup:
        """The ranks that share this rank's layers."""
        return self.device_mesh["tp"].get_group()

    @property
    def cp_group(self) -> dist.ProcessGroup:
        """The ranks that share this rank's rows' tokens."""
        return self.device_mesh["cp"].get_group()

    def fsdp_mesh(self) -> DeviceMesh:
        """What FSDP2 shards over: dp_shard and cp together, in two dims behind dp_replicate where there are copies."""
        shard = "shard" if self.sizes.cp > 1 else "dp_shard"
        return self.device_mesh["dp_replicate", shard] if self.sizes.dp_replicate > 1 else self.device_mesh[shard]

    def sum_scalars(self, values: list[float]) -> list[float]:
        """Each value summed over the shares of the data, in float64 and in rank order: the same bits on every rank."""
        if self.sizes.data == 1:
            return [float(value) for value in values]
        return self.sum_in_order(self.gather([float(value) for value in values])[:: self.sizes.cp * self.sizes.tp])

    @staticmethod
    def sum_in_order(rows: list[list[float]]) -> list[float]:
        """Column sums, first row first."""
        totals = list(rows[0])
        for row in rows[1:]:
            totals = [total + value for total, value in zip(totals, row, strict=True)]
        return totals

    def gather(self, item: T) -> list[T]:
        """Every rank's `item` (plain data), in rank order, on every rank."""
        if self.world_size == 1:
            return [item]
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item, group=self.host_group)
        return items

    def from_first(self, item: T) -> T:
        """Rank 0's `item` (plain data), on every rank."""
        if self.world_size == 1:
            return item
        items = [item]
        dist.broadcast_object_list(items, src=0, group=self.host_group)
        return items[0]

    def barrier(self) -> None:
        """Returns once every rank has come here."""
        if self.world_size > 1:
            self.gather(None)


@contextmanager
def open_mesh(device: Literal["auto", "cpu", "cuda"] = "auto", config: MeshConfig | None = None) -> Iterator[Mesh]:
    """Joins the process group of this run and leaves it on exit.

    `auto` is CUDA where a GPU is visible, else the CPU. Raises RecipeError where the ranks cannot be laid out so.
    """
    assert not dist.is_initialized(), "a process belongs to one mesh at a time"
    sizes = (config or MeshConfig()).sizes(int(os.environ.get("WORLD_SIZE", "1")))
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    here = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(here)
    backend = "nccl" if kind == "cuda" else "gloo"
    limit = timedelta(seconds=COLLECTIVE_SECONDS)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=limit)
    else:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=limit)
    try:
        world_size = dist.get_world_size()
        device_mesh = init_device_mesh(kind, tuple(sizes), mesh_dim_names=Sizes._fields)
        if sizes.cp > 1:
            device_mesh["dp_shard", "cp"]._flatten("shard")
        host_group = dist.new_group(backend="gloo", timeout=limit) if kind == "cuda" and world_size > 1 else None
        yield Mesh(here, dist.get_rank(), world_size, sizes, device_mesh, host_group)
    finally:
        dist.destroy_process_group()
