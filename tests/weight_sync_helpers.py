"""Weights in memory that say what they are, and tensors to send."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.model.policy_model import PolicyModel
from burnish.rollout.weights import digest_of, outgoing


class InMemory:
    """A version that no transport has touched."""

    def __init__(self, tensors: list[tuple[str, Tensor]], *, adapter_only: bool = False, digest: str = "") -> None:
        self.version, self.adapter_only, self.sent = 7, adapter_only, tensors
        self.digest = digest or digest_of(tensors)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.sent)

    def folder(self) -> Path:
        raise AssertionError("nobody asks for it")


def copied(model: PolicyModel, *, adapter_only: bool = False) -> list[tuple[str, Tensor]]:
    """All that travels, as it is now."""
    return [(name, tensor.clone()) for name, tensor in outgoing(model, adapter_only=adapter_only)]


def some_tensors(seed: int = 0) -> list[tuple[str, Tensor]]:
    """Of several dtypes and odd sizes; `up` and `down` are of one shape."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return [
        ("odd", normal(3).bfloat16()),
        ("up", normal(4, 6)),
        ("flag", torch.tensor([True, False, True])),
        ("down", normal(4, 6)),
        ("scale", torch.tensor(0.5, dtype=torch.float64)),
        ("none", torch.zeros(0, 5)),
        ("count", torch.tensor([5, 6, 7], dtype=torch.int64)),
    ]


def send(sender: Any, version: int, tensors: list[tuple[str, Tensor]], **how: Any) -> dict[str, Any]:
    """Sends, and returns the parcel."""
    return sender.send(version, iter(tensors), **({"adapter_only": False, "folder": None} | how))


def same(found: Any, expected: list[tuple[str, Tensor]]) -> bool:
    """Whether names, dtypes, shapes and bits are those expected, in any order."""
    found, wanted = dict(found), dict(expected)
    return found.keys() == wanted.keys() and all(
        found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]) for name in wanted
    )
