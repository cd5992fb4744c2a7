"""Deferred tensors hold what the same operations make of real ones, and read no more of it than was asked for."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from burnish.model.deferred import deferred, sources, values
from burnish.region import Region

OPERATIONS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "experts fused": lambda e: torch.cat([torch.stack(e[:3], dim=0), torch.stack(e[3:], dim=0)], dim=1),
    "padded, cast": lambda e: torch.cat([e[0], e[0].new_zeros(3, 4)]).float(),
    "rows between others": lambda e: torch.cat([e[0][:2], e[1][1:3], e[0][4:]]),
    "part of a column": lambda e: e[0].chunk(2, dim=1)[1].clone(),
    "narrowed": lambda e: torch.cat(e, dim=1).narrow(1, 5, 9).contiguous(),
    "split": lambda e: torch.split(torch.cat(e), [7, 29], dim=0)[1],
}
"""Of six [6, 4] tensors in bfloat16; none needs more of them than the region has."""
WHOLE: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "transposed": lambda e: e[0].T.contiguous(),
    "chosen rows": lambda e: e[0][[4, 1, 1]],
    "norms": lambda e: torch.linalg.norm(e[0].float() + e[1].float(), dim=1),
    "interleaved": lambda e: e[0].reshape(3, 2, 4).transpose(0, 1).reshape(6, 4),
    "parts squeezed": lambda e: torch.cat([part.squeeze(0) for part in e[0].chunk(6)]),
}
"""Those that make their inputs whole."""


def originals() -> list[Tensor]:
    return list(torch.randn(6, 6, 4, generator=torch.Generator().manual_seed(0)).bfloat16())


def waiting(real: list[Tensor], read: list[int]) -> list[Tensor]:
    """The same, deferred; every reading adds its elements to `read`."""

    def leaf(index: int) -> Tensor:
        def make(region: Region) -> Tensor:
            read.append(region.numel)
            return real[index][region.slices()].clone()

        return deferred(make, (6, 4), torch.bfloat16, source=str(index))

    return [leaf(index) for index in range(len(real))]


def boxes(shape: torch.Size) -> list[Region]:
    """Every box that begins and ends at one of three places of each dim."""
    spans = [list(itertools.combinations(sorted({0, n // 2, n}), 2)) for n in shape]
    return [
        Region(tuple(shape), tuple(begin for begin, _ in box), tuple(end - begin for begin, end in box))
        for box in itertools.product(*spans)
    ]


@pytest.mark.parametrize("name", [*OPERATIONS, *WHOLE])
def test_regions_are_those_of_the_real_tensor(name: str) -> None:
    make, read = (OPERATIONS | WHOLE)[name], []
    expected, tensor = make(originals()), make(waiting(originals(), read))
    assert (tensor.is_meta, tensor.shape, tensor.dtype) == (True, expected.shape, expected.dtype)
    assert not read
    for box in boxes(expected.shape):
        read.clear()
        assert torch.equal(values(tensor, box), expected[box.slices()]), box
        assert name in WHOLE or sum(read) <= box.numel, box


def test_a_parameter_is_cast_copied_and_moved_as_a_real_one() -> None:
    real = originals()
    layer = nn.Linear(4, 6, bias=False, device="meta")
    layer.weight = nn.Parameter(waiting(real, [])[0])
    layer.to("cpu").requires_grad_(False)
    layer.weight.data = layer.weight.data.float()
    twin: Any = copy.deepcopy(layer)
    layer.weight.data = layer.weight.data.bfloat16()
    assert not layer.weight.requires_grad and not twin.weight.requires_grad
    assert isinstance(twin.weight, nn.Parameter)
    assert torch.equal(values(twin.weight), real[0].float())
    assert torch.equal(values(layer.weight), real[0])


def test_it_says_what_it_is_made_of() -> None:
    parts = waiting(originals(), [])
    assert sources(torch.cat([parts[2], parts[4]]).float()[1:]) == {"2", "4"}


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.zero_(),
        lambda t: t.__setitem__(0, 1.0),
        lambda t: t.copy_(torch.zeros(6, 4)),
        lambda t: t.__iadd__(1),
    ],
)
def test_a_change_in_place_is_never_lost_in_silence(change: Callable[[Tensor], Any]) -> None:
    with pytest.raises(AssertionError, match="would change a tensor that is not made yet"):
        change(waiting(originals(), [])[0])


def test_equal_compares_values() -> None:
    real = originals()
    a, b, _ = waiting([real[0], real[0].clone(), real[1]], [])
    assert torch.equal(a, b)
    assert not torch.equal(a, waiting(real, [])[1])
    assert not torch.equal(a, b.float())
