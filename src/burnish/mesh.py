"""The ranks of a run and the device they compute on.

One path for one process and for many: a single process is a process group of one, opened over an in-memory store, so no
port is bound and two runs on a machine never meet. Under torchrun (or SLURM with its variables) the same call joins the
group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe. This module must not know models or data.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, slots=True)
class Mesh:
    """This process's place among the ranks."""

    device: torch.device
    rank: int
    world_size: int
    device_mesh: DeviceMesh
    """One axis, `data`: every rank holds a shard of the model and its own rows."""

    def sum_scalars(self, values: list[float]) -> list[float]:
        """Each value summed over the ranks, in float64: token counts stay exact up to 2**53."""
        if self.world_size == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def barrier(self) -> None:
        """Returns once every rank has come here."""
        if self.world_size > 1:
            self.sum_scalars([0.0])


@contextmanager
def open_mesh(device: Literal["auto", "cpu", "cuda"] = "auto") -> Iterator[Mesh]:
    """Joins the process group of this run and leaves it on exit.

    `auto` is CUDA where a GPU is visible, else the CPU.
    """
    assert not dist.is_initialized(), "a process belongs to one mesh at a time"
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    here = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(here)
    backend = "nccl" if kind == "cuda" else "gloo"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        world_size = dist.get_world_size()
        device_mesh = init_device_mesh(kind, (world_size,), mesh_dim_names=("data",))
        yield Mesh(here, dist.get_rank(), world_size, device_mesh)
    finally:
        dist.destroy_process_group()
