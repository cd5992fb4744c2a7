"""The ranks of a run, how they are laid out, and the device they compute on.

One path for one process and for many: a single process is a process group of one, opened over an in-memory store, so no
port is bound and two runs on a machine never meet. Under torchrun, a supervisor or SLURM the same call joins the group
that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe. This module must not know models or data.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
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
    alive: Callable[[], None] = lambda: None
    """A sign of life for whoever supervises this rank: called whenever a piece of work or an exchange is done."""

    @property
    def peers(self) -> int:
        """Ranks that share one share of the data, next to each other: those of a tp x cp group."""
        return self.sizes.cp * self.sizes.tp

    @property
    def data_rank(self) -> int:
        """Whose share of a step's rows this rank has, of `sizes.data`; the ranks of one tp x cp group share theirs."""
        return self.rank // self.peers

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
        with warnings.catch_warnings():  # torch has no other way yet to put a flattened axis beside `dp_replicate`
            warnings.filterwarnings("ignore", "Slicing a flattened dim")
            return self.device_mesh["dp_replicate", shard] if self.sizes.dp_replicate > 1 else self.device_mesh[shard]

    def sum_scalars(self, values: list[float]) -> list[float]:
        """Each value summed over the shares of the data; see `sum_rows`."""
        return self.sum_rows(torch.tensor([values], dtype=torch.float64))

    def sum_rows(self, rows: Tensor, *, every_rank: bool = False) -> list[float]:
        """Column sums of float64 [n, k] over the shares of the data, of which each has as many rows.

        Exactly rounded (`math.fsum`), so they do not depend on which rank brought which row; the same on every rank.

        Args:
            every_rank: over all ranks, those of one tp x cp group too.
        """
        self.alive()
        rows = rows.detach().to("cpu", torch.float64)
        if self.world_size > 1:
            parts = [torch.empty_like(rows) for _ in range(self.world_size)]
            dist.all_gather(parts, rows.contiguous(), group=self.host_group)
            rows = torch.cat(parts[:: 1 if every_rank else self.peers])
        return [_exact_sum(column) for column in rows.t().tolist()]

    def gather(self, item: T) -> list[T]:
        """Every rank's `item` (JSON: tuples come back as lists), in rank order, on every rank."""
        self.alive()
        if self.world_size == 1:
            return [item]
        mine = torch.frombuffer(bytearray(json.dumps(item).encode()), dtype=torch.uint8)
        sizes = [torch.empty(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(mine)]), group=self.host_group)
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded, group=self.host_group)
        return [json.loads(bytes(part[: int(size)].numpy())) for part, size in zip(parts, sizes, strict=True)]

    def gather_tensor(self, tensor: Tensor) -> list[Tensor]:
        """Every data share's `tensor`, of one shape and any dtype, where it is; without a graph."""
        if self.sizes.data == 1:
            return [tensor.detach()]
        mine = tensor.detach().contiguous().reshape(-1).view(torch.uint8)  # gloo has no bool, nccl no int16
        parts = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(parts, mine, group=self.host_group if mine.is_cpu else None)
        return [part.view(tensor.dtype).reshape(tensor.shape) for part in parts[:: self.peers]]

    def from_first(self, item: T) -> T:
        """Rank 0's `item` (JSON), on every rank. It is sent once: rollouts of a step are tens of megabytes."""
        self.alive()
        if self.world_size == 1:
            return item
        said = json.dumps(item).encode() if self.rank == 0 else b""
        size = torch.tensor([len(said)])
        dist.broadcast(size, 0, group=self.host_group)
        data = (
            torch.frombuffer(bytearray(said), dtype=torch.uint8) if said else torch.empty(int(size), dtype=torch.uint8)
        )
        dist.broadcast(data, 0, group=self.host_group)
        return item if self.rank == 0 else json.loads(bytes(data.numpy()))

    def barrier(self) -> None:
        """Returns once every rank has come here."""
        if self.world_size > 1:
            self.gather(None)


@contextmanager
def open_mesh(
    device: Literal["auto", "cpu", "cuda"] = "auto",
    config: MeshConfig | None = None,
    alive: Callable[[], None] = lambda: None,
) -> Iterator[Mesh]:
    """Joins the process group of this run and leaves it on exit.

    `auto` is CUDA where a GPU is visible, else the CPU. `alive`: see `Mesh`.

    Raises:
        RecipeError: the ranks cannot be laid out so.
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
        hosts: Any = dist.new_group(backend="gloo", timeout=limit) if kind == "cuda" and world_size > 1 else None
        yield Mesh(here, dist.get_rank(), world_size, sizes, device_mesh, hosts, alive)
    finally:
        dist.destroy_process_group()


def _exact_sum(values: list[float]) -> float:
    # fsum refuses inf - inf and what overflows on the way; such a sum is no number that anybody goes on with.
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
