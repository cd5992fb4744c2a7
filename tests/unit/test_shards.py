"""Boxes of a parameter on every rank of a mesh: each is what the rank holds, and writers write all of it once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from burnish.mesh import Mesh
from burnish.mesh_config import Sizes
from burnish.model.shards import is_writer, local, region_of

SHAPES: dict[str, tuple[tuple[int, ...], int | None]] = {
    "by rows": ((12, 3), 0),
    "by columns": ((5, 4), 1),
    "uneven": ((9, 2), None),
    "fewer rows than ranks": ((1, 6), None),
    "a vector": ((7,), None),
    "experts": ((6, 4, 2), 1),
}
"""Whole shape, and which dim tensor parallel cuts."""
LAYOUTS = [
    Sizes(1, 4, 1, 1),
    Sizes(2, 2, 1, 1),
    Sizes(1, 2, 2, 1),
    Sizes(1, 2, 1, 2),
    Sizes(2, 2, 1, 2),
    Sizes(1, 2, 2, 2),
]


@contextmanager
def as_rank(rank: int, sizes: Sizes) -> Iterator[Mesh]:
    """A mesh as rank `rank` of it sees it; there are no other ranks, and nothing is exchanged."""
    dist.init_process_group("fake", rank=rank, world_size=sizes.world, store=FakeStore())
    try:
        device_mesh = init_device_mesh("cpu", tuple(sizes), mesh_dim_names=Sizes._fields)
        if sizes.cp > 1:
            device_mesh["dp_shard", "cp"]._flatten("shard")
        yield Mesh(torch.device("cpu"), rank, sizes.world, sizes, device_mesh)
    finally:
        dist.destroy_process_group()


def held(whole: Tensor, tp_dim: int | None, mesh: Mesh) -> Tensor:
    """What FSDP leaves of what tensor parallel leaves."""
    part = whole if tp_dim is None else whole.chunk(mesh.sizes.tp, tp_dim)[mesh.axis_rank("tp")]
    over = mesh.fsdp_mesh()
    return distribute_tensor(part.contiguous(), over, [*[Replicate()] * (over.ndim - 1), Shard(0)], src_data_rank=None)


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_writers_of_all_ranks_write_every_element_once(sizes: Sizes) -> None:
    model: Any = SimpleNamespace(tp_dims={name: dim for name, (_, dim) in SHAPES.items() if dim is not None})
    written = {name: torch.zeros(shape, dtype=torch.int64) for name, (shape, _) in SHAPES.items()}
    numbers = plain = 0
    for rank in range(sizes.world):
        with as_rank(rank, sizes) as mesh:
            for name, (shape, tp_dim) in SHAPES.items():
                whole = torch.arange(written[name].numel()).view(shape)
                tensor = held(whole, tp_dim, mesh)
                region = region_of(model, name, tensor, mesh)
                assert region.whole == shape
                assert torch.equal(local(tensor), whole[region.slices()]), (name, rank)
                if is_writer(model, name, tensor, mesh):
                    written[name][region.slices()] += 1
            numbers += is_writer(model, "by rows", torch.tensor(3.0), mesh)  # an optimizer's step count
            plain += is_writer(model, "uneven", torch.zeros(9, 2), mesh)  # not sharded at all
    assert all(bool((count == 1).all()) for count in written.values()), written
    assert (numbers, plain) == (1, 1)
