"""Where the piece of a parameter that this rank holds lies in the whole, who writes it, and how the whole is gathered.

Two cuts compose, both into boxes. Tensor parallel gives each rank of the `tp` axis an equal part of one dim, a plain
tensor; FSDP2 cuts dim 0 of that part over `Mesh.fsdp_mesh()`, a DTensor. A [8, 6] weight with `tp_dims` 1 on a mesh of
dp_shard 4 x tp 2: the rank with dp_shard 3 and tp 1 holds rows 6 and 7 of columns 3 to 5. What has the shape of a
parameter (its gradient, its moments) lies where it does. It must not know files or models beyond names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from burnish.region import Region

if TYPE_CHECKING:
    from burnish.mesh import Mesh
    from burnish.model.policy_model import PolicyModel


class Whole(NamedTuple):
    """A whole tensor that is yet to be gathered."""

    make: Callable[[], Tensor]
    """Gathers it. Every rank calls this, of the same tensors in the same order."""
    shape: tuple[int, ...]
    dtype: torch.dtype


def region_of(model: PolicyModel, name: str, tensor: Tensor, mesh: Mesh) -> Region:
    """Where this rank's part of the parameter `name`, or of a `tensor` shaped as it, lies in the whole one.

    The box is empty where there are more ranks than rows. A number (an optimizer's step count) is whole on every rank.
    """
    shape, offsets, lengths = map(list, sharded_region(tensor))
    dim = model.tp_dims.get(name) if tensor.ndim else None
    if dim is not None:
        offsets[dim] += mesh.axis_rank("tp") * shape[dim]
        shape[dim] *= mesh.sizes.tp
    return Region(tuple(shape), tuple(offsets), tuple(lengths))


def sharded_region(tensor: Tensor) -> Region:
    """Where the local part of a sharded tensor lies in all of it, tensor parallel left out; all of a plain one."""
    shape, offsets, lengths = tuple(tensor.shape), [0] * tensor.ndim, list(tensor.shape)
    for placement, rank, size in _placements(tensor) if isinstance(tensor, DTensor) else ():
        if isinstance(placement, Shard):
            step = -(-lengths[placement.dim] // size)  # as torch.chunk: 5 rows over 4 ranks are 2, 2, 1 and 0
            begin = min(rank * step, lengths[placement.dim])
            offsets[placement.dim] += begin
            lengths[placement.dim] = min(step, lengths[placement.dim] - begin)
    return Region(shape, tuple(offsets), tuple(lengths))


def is_writer(model: PolicyModel, name: str, tensor: Tensor, mesh: Mesh) -> bool:
    """Whether this rank writes its part: of ranks that hold the same box, the first one does.

    An empty box has a writer too, who has nothing to write.
    """
    if mesh.axis_rank("tp") != 0 and (tensor.ndim == 0 or name not in model.tp_dims):
        return False
    if isinstance(tensor, DTensor):
        return all(rank == 0 for placement, rank, _ in _placements(tensor) if isinstance(placement, Replicate))
    return all(mesh.axis_rank(axis) == 0 for axis in ("dp_replicate", "dp_shard", "cp"))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, without its graph; memory is shared."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor, tp_dim: int | None = None, mesh: Mesh | None = None) -> Tensor:
    """The tensor without its graph, gathered from all ranks where it is sharded: every rank must then ask.

    Args:
        tp_dim: what tensor parallel cuts of it; None: nothing.
        mesh: needed with `tp_dim`.
    """
    tensor = tensor.detach()
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    if tp_dim is None or mesh is None or mesh.sizes.tp == 1:
        return tensor
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(mesh.sizes.tp)]
    dist.all_gather(parts, tensor, group=mesh.tp_group)
    return torch.cat(parts, dim=tp_dim)


def whole_parameter(model: PolicyModel, name: str, tensor: Tensor) -> Tensor:
    """`whole` of the parameter `name` of `model`, or of a tensor shaped as it (its gradient)."""
    return whole(tensor, model.tp_dims.get(name), model.mesh)


def reader(model: PolicyModel) -> Callable[[Tensor], Tensor]:
    """`whole`, for any parameter of `model` and for what is none, which it returns as it is."""
    named = model.named_parameters(remove_duplicate=False)
    dims = {id(parameter): model.tp_dims[name] for name, parameter in named if name in model.tp_dims}

    def read(tensor: Tensor) -> Tensor:
        if model.mesh is not None:
            model.mesh.alive()
        return whole(tensor, dims.get(id(tensor)), model.mesh)

    return read


def whole_shape(model: PolicyModel, name: str, tensor: Tensor) -> tuple[int, ...]:
    """The shape of the parameter `name` before anything was cut."""
    shape = list(tensor.shape)
    if name in model.tp_dims and model.mesh is not None:
        shape[model.tp_dims[name]] *= model.mesh.sizes.tp
    return tuple(shape)


def gathered(tensors: Mapping[str, Whole]) -> dict[str, Tensor]:
    """All of them in memory."""
    return {name: whole.make() for name, whole in tensors.items()}


def _placements(tensor: DTensor) -> list[tuple[Shard | Replicate, int, int]]:
    """(placement, this rank's place, ranks) along each dim of the device mesh that a tensor lies on."""
    place = tensor.device_mesh.get_coordinate()
    assert place is not None, "this rank is not on the mesh of its own parameter"
    found = []
    for placement, rank, size in zip(tensor.placements, place, tensor.device_mesh.shape, strict=True):
        assert type(placement) in (Shard, Replicate), f"{placement} is no box"
        found.append((placement, rank, size))
    return found
