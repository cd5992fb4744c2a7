"""Tensors without memory that remember how their values are made, and make any region of them later.

A model that is to be cut over many ranks is built of these. What one rank does to real tensors (fuse a layer's experts,
pad the vocabulary, put rows of new tokens in, copy to float32) is done to them by the same code; at the end each rank
asks for the region it keeps, and the files are read there and nowhere else. So what is cut is what one rank loads, bit
for bit, and no rank ever has the whole. This module must not know models, files or ranks.

    >>> weight = deferred(read, (8, 4), torch.bfloat16)          # `read` is given a Region and returns its values
    >>> padded = torch.cat([weight, weight.new_zeros(2, 4)]).float()
    >>> values(padded, Region((10, 4), (7, 0), (2, 4)))          # reads row 7 of `weight`, no more; row 8 is zeros
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from burnish.region import Region

Read = Callable[[Region], Tensor]
"""The values of a region of one tensor, in the shape of the region and the dtype of the tensor."""

COMPARED_BYTES = 32 * 2**20
"""How much of two tensors is compared at once."""


class Deferred(Tensor):
    """A tensor on the meta device with a `Read`. Made by `deferred`; what is computed from one is one.

    Slices, joins and casts make their region from regions. Everything else makes all of its inputs and cuts: right,
    but as much memory as that takes. Nothing changes one in place but `assign` and `tensor.data = other`.
    """

    read: Read
    sources: frozenset[str]

    def __new__(cls, tensor: Tensor, requires_grad: bool = False, **_: Any) -> Any:
        """A parameter of a deferred tensor: accelerate, which PEFT calls, makes a parameter's class again like this."""
        return _parameter(tensor, requires_grad)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")
        assert not (in_place and is_deferred(args[0])), f"{name} would change a tensor that is not made yet"
        if func is Tensor.__deepcopy__:
            return _parameter(args[0].detach(), args[0].requires_grad)
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            func, args, kwargs = _without_device(func, args, kwargs)
        if func is torch.equal:
            return _equal(*args)
        with torch._C.DisableTorchFunctionSubclass():
            made = func(*args, **kwargs)
        if func == _SET_DATA:
            args[0].read = args[1].read if isinstance(args[1], Deferred) else _unknown
            args[0].sources = sources(args[1])
            return made
        if not any(isinstance(part, Tensor) for part in pytree.tree_leaves(made)):
            return made
        if func is Tensor.requires_grad_:
            return args[0]
        # As they are now: `tensor.data = tensor.data.float()` must not read itself.
        args, kwargs = pytree.tree_map_only(Deferred, lambda it: _wrap(it, it.read, it.sources), (args, kwargs))
        of = frozenset().union(*map(sources, pytree.tree_leaves((args, kwargs))))
        if isinstance(made, Tensor):
            return _wrap(made, _reader(func, args, kwargs, made), of)
        parts = [_wrap(part, _part_reader(func, args, kwargs, i, made), of) for i, part in enumerate(made)]
        return type(made)(parts)


def deferred(read: Read, shape: Sequence[int], dtype: torch.dtype, source: str = "") -> Tensor:
    """A tensor whose values `read` makes when they are asked for; `source` is what `sources` calls it."""
    empty = torch.empty(tuple(shape), dtype=dtype, device="meta")
    return _wrap(empty, read, frozenset({source} if source else ()))


def sources(tensor: Any) -> frozenset[str]:
    """The named tensors that a deferred one is made of."""
    return tensor.sources if isinstance(tensor, Deferred) else frozenset()


def is_deferred(tensor: Tensor | None) -> bool:
    """Whether this tensor's values are yet to be made."""
    return isinstance(tensor, Deferred)


def later(make: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor that can only be made whole; regions are cut out of what `make` returns."""
    return deferred(lambda region: make()[region.slices()].to(dtype, copy=True), shape, dtype)


def assign(owner: nn.Module, name: str, make: Callable[[], Tensor]) -> None:
    """Gives the parameter `name` of `owner` what `make` returns: at once, or later where it has no memory."""
    parameter = owner._parameters[name]
    assert parameter is not None
    if not parameter.is_meta:
        with torch.no_grad():
            parameter.copy_(make())
        return
    made = later(make, parameter.shape, parameter.dtype)
    owner._parameters[name] = _parameter(made, parameter.requires_grad)


def values(tensor: Tensor, region: Region | None = None) -> Tensor:
    """The values of a region of `tensor`, all of it by default."""
    region = region or Region.all_of(tuple(tensor.shape))
    if not isinstance(tensor, Deferred):
        return tensor[region.slices()]
    if not region.numel:
        return torch.empty(region.lengths, dtype=tensor.dtype)
    with torch.no_grad():
        made = tensor.read(region)
    assert (made.shape, made.dtype) == (torch.Size(region.lengths), tensor.dtype), f"{made.shape}, {made.dtype}"
    return made


def _unknown(region: Region) -> Tensor:
    raise AssertionError("this tensor was resized, and nothing says what it holds now")


def _equal(a: Tensor, b: Tensor) -> bool:
    """Compared a few rows at a time."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.ndim:
        return torch.equal(values(a), values(b))
    step = max(1, COMPARED_BYTES * a.shape[0] // max(1, a.nbytes))
    slabs = [slice(begin, begin + step) for begin in range(0, a.shape[0], step)]
    return all(torch.equal(values(a[slab]), values(b[slab])) for slab in slabs)


def _wrap(meta: Tensor, read: Read, of: frozenset[str]) -> Deferred:
    with torch._C.DisableTorchFunctionSubclass():
        tensor = Tensor._make_subclass(Deferred, meta.detach())  # pyright: ignore[reportAttributeAccessIssue]
    tensor.read, tensor.sources = read, of
    return tensor


def _parameter(tensor: Tensor, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad and tensor.is_floating_point())


def _without_device(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """There is no memory to move: the device is chosen when the values are made."""
    if func is not Tensor.to:
        return Tensor.detach, args[:1], {}
    dtypes = [part for part in (*args[1:], kwargs.get("dtype")) if isinstance(part, torch.dtype)]
    dtypes += [part.dtype for part in (*args[1:], kwargs.get("other")) if isinstance(part, Tensor)]
    return func, (args[0], (dtypes or [args[0].dtype])[0]), {}


_DATA: Any = Tensor.data
_SET_DATA = _DATA.__set__
_SAME = (Tensor.detach, Tensor.contiguous, Tensor.clone, _DATA.__get__)
_CAST = (Tensor.to, Tensor.float, Tensor.bfloat16, Tensor.half)
_ZEROS = (Tensor.new_zeros, torch.zeros_like)
_IN_PLACE = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")


def _reader(func: Any, args: Any, kwargs: Any, made: Tensor) -> Read:
    dtype = made.dtype  # now: `made` may be the parameter itself, which is cast in place later
    if func in _SAME:
        return args[0].read
    if func in _CAST:
        return lambda region: values(args[0], region).to(dtype)
    if func in _ZEROS:
        return lambda region: torch.zeros(region.lengths, dtype=dtype)
    if func in (torch.cat, torch.concat):
        return _joined(args[0], kwargs.get("dim", args[1] if len(args) > 1 else 0) % made.ndim)
    if func is torch.stack:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % made.ndim
        return _joined([part.unsqueeze(dim) for part in args[0]], dim)
    if func is Tensor.unsqueeze:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % made.ndim
        return lambda region: values(args[0], _without(region, dim)).unsqueeze(dim)
    if func is Tensor.narrow:
        return _shifted(args[0], _starts(made, **dict(zip(("dim", "start"), args[1:], strict=False), **kwargs)))
    if func is Tensor.__getitem__ and (starts := _slice_starts(args[0], args[1])) is not None:
        return _shifted(args[0], starts)
    return lambda region: _called(func, args, kwargs)[region.slices()].clone()


def _part_reader(func: Any, args: Any, kwargs: Any, index: int, made: Sequence[Tensor]) -> Read:
    """Of the part `index` of what `func` returned; of chunks and splits, where in the whole it begins."""
    if func in (Tensor.chunk, torch.chunk, Tensor.split, torch.split, Tensor.tensor_split, torch.tensor_split):
        dim = kwargs.get("dim", args[2] if len(args) > 2 else 0) % made[0].ndim
        return _shifted(args[0], _starts(made[0], dim, sum(part.shape[dim] for part in made[:index])))
    return lambda region: _called(func, args, kwargs)[index][region.slices()].clone()


def _called(func: Any, args: Any, kwargs: Any) -> Any:
    args, kwargs = pytree.tree_map_only(Deferred, values, (args, kwargs))
    return func(*args, **kwargs)


def _joined(parts: Sequence[Tensor], dim: int) -> Read:
    """Of tensors laid end to end along `dim`: each is asked for what the region has of it."""
    sizes = [part.shape[dim] for part in parts]

    def read(region: Region) -> Tensor:
        found, begin = [], 0
        for part, size in zip(parts, sizes, strict=True):
            here = region.overlap(_spanned(region, dim, begin, size))
            if here is not None:
                found.append(values(part, _moved(here, part, _starts(part, dim, -begin))))
            begin += size
        return found[0] if len(found) == 1 else torch.cat(found, dim)

    return read


def _shifted(tensor: Tensor, starts: Sequence[int]) -> Read:
    return lambda region: values(tensor, _moved(region, tensor, starts))


def _moved(region: Region, tensor: Tensor, starts: Sequence[int]) -> Region:
    """`region` of a part of `tensor` that begins at `starts`, as a region of `tensor`."""
    offsets = tuple(offset + start for offset, start in zip(region.offsets, starts, strict=True))
    return Region(tuple(tensor.shape), offsets, region.lengths)


def _spanned(region: Region, dim: int, begin: int, size: int) -> Region:
    offsets, lengths = [0] * len(region.whole), list(region.whole)
    offsets[dim], lengths[dim] = begin, size
    return Region(region.whole, tuple(offsets), tuple(lengths))


def _without(region: Region, dim: int) -> Region:
    return Region(*(part[:dim] + part[dim + 1 :] for part in region))


def _starts(tensor: Tensor, dim: int, start: int, **_: Any) -> list[int]:
    starts = [0] * tensor.ndim
    starts[dim] = start
    return starts


def _slice_starts(tensor: Tensor, index: Any) -> list[int] | None:
    """Where a part that was indexed by slices of step 1 begins; None where it was indexed by something else."""
    index = index if isinstance(index, tuple) else (index,)
    if index == (Ellipsis,):
        return [0] * tensor.ndim
    if not all(isinstance(part, slice) and part.step in (None, 1) for part in index):
        return None
    bounds = zip(index, tensor.shape, strict=False)
    return [part.indices(size)[0] for part, size in bounds] + [0] * (tensor.ndim - len(index))
