"""What proves that weights arrived: a checksum for every tensor, one digest over all, and a receipt of what is held.

    trainer      outgoing(model) -> (name, tensor), ...      Listing.add each      digest = 8c1f...
    transport    brings tensors, listing and digest          each tensor is checked against the listing on arrival
    worker       load_into(model, weights)                   the model is read back: digest 8c1f..., or SyncFailed

The digest covers names, dtypes, shapes and bytes, in any order. It is computed anew over what the receiving model
holds, so an adapter that was delivered and not applied shows.
"""

from __future__ import annotations

import hashlib
import math
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from burnish.errors import SyncFailed
from burnish.model.tensor_bytes import DTYPE_NAMES, DTYPES, tensor_bytes
from burnish.model.wire import Incoming, adapter_alone, outgoing
from burnish.rollout.engine import Receipt

if TYPE_CHECKING:
    import torch

    from burnish.model.policy_model import PolicyModel
    from burnish.rollout.engine import Weights

__all__ = ["Entry", "Listing", "adapter_alone", "digest_of", "load_into", "outgoing"]


class Entry(NamedTuple):
    """What is known of a tensor without its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    crc32: int
    """Of its bytes, as in checkpoints: 2.5 GB/s on one core, where blake2b runs at 0.5 and sha256 at 1.0."""

    @classmethod
    def of(cls, tensor: Tensor) -> Entry:
        """Of a tensor on any device."""
        tensor = tensor.detach().contiguous().cpu()
        return cls(tensor.dtype, tuple(tensor.shape), zlib.crc32(tensor_bytes(tensor)))

    @property
    def num_bytes(self) -> int:
        """Of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{DTYPE_NAMES[self.dtype]} {list(self.shape)}"


@dataclass(slots=True)
class Listing:
    """The tensors of a version, by name.

    >>> Listing().add("bias", torch.zeros(2)).digest
    '3fee13fee1a3dfb6a4c8f0e8ae2de5cd'
    """

    entries: dict[str, Entry] = field(default_factory=dict)

    def add(self, name: str, tensor: Tensor) -> Listing:
        """Notes a tensor; a name comes once."""
        assert name not in self.entries, f"{name} twice"
        self.entries[name] = Entry.of(tensor)
        return self

    @property
    def digest(self) -> str:
        """32 hexadecimal digits."""
        lines = (f"{name} {entry} {entry.crc32:08x}\n" for name, entry in sorted(self.entries.items()))
        return hashlib.blake2b("".join(lines).encode(), digest_size=16).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(entry.num_bytes for entry in self.entries.values())

    def require(self, name: str, tensor: Tensor, where: str) -> Tensor:
        """The tensor, if it is the one that was sent under this name.

        Raises:
            SyncFailed: nothing was, or another.
        """
        sent, found = self.entries.get(name), Entry.of(tensor)
        if sent is None:
            raise SyncFailed(f"{where}: {name} came, which was not sent")
        if sent[:2] != found[:2]:
            raise SyncFailed(f"{where}: {name} is {found}, it was sent as {sent}")
        if sent.crc32 != found.crc32:
            raise SyncFailed(f"{where}: {name} does not hold what was sent: its checksum differs")
        return tensor

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {name: [DTYPE_NAMES[e.dtype], list(e.shape), e.crc32] for name, e in self.entries.items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Listing:
        """The listing that `to_json` gave. Raises KeyError, TypeError, ValueError: it is none."""
        entries = {name: Entry(DTYPES[dtype], tuple(shape), int(crc)) for name, (dtype, shape, crc) in data.items()}
        return cls(entries)


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """32 hexadecimal digits of names, dtypes, shapes and bytes; order and device of the tensors do not matter."""
    listing = Listing()
    for name, tensor in tensors:
        listing.add(name, tensor)
    return listing.digest


def load_into(model: PolicyModel, weights: Weights) -> Receipt:
    """Puts a version into a worker's own model, and says what the model then holds.

    Args:
        model: made from the policy's recipe, whole in this process.

    Raises:
        SyncFailed: a tensor is missing, not the model's, or of another shape or dtype; or the model, read back, does
            not hold what was sent. What it holds then is no version.
    """
    started, where = time.perf_counter(), f"weights of version {weights.version}"
    try:
        incoming = Incoming(model, adapter_only=weights.adapter_only)
    except ValueError as error:
        raise SyncFailed(f"{where}: {error}") from error
    for name, tensor in weights.tensors():
        _require(name, tensor, incoming, where)
        incoming.put(name, tensor)
    if incoming.missing:
        raise SyncFailed(f"{where}: {_few(sorted(incoming.missing))} did not come")
    held = Listing()
    for name, tensor in incoming.held():
        held.add(name, tensor)
    if held.digest != weights.digest:
        wrong = [name for name, tensor in weights.tensors() if held.entries.get(name) != Entry.of(tensor)]
        found = f"the model, read back, does not hold {_few(wrong)}" if wrong else "what came is not what was sent"
        raise SyncFailed(f"{where}: {found}: digest {held.digest}, not {weights.digest}")
    return Receipt(weights.version, held.digest, held.num_bytes, time.perf_counter() - started)


def _require(name: str, tensor: Tensor, incoming: Incoming, where: str) -> None:
    if name not in incoming.expected:
        raise SyncFailed(f"{where}: {name} is not this model's; are engine and policy of one recipe?")
    if name not in incoming.missing:
        raise SyncFailed(f"{where}: {name} came twice")
    shape, dtype = incoming.expected[name]
    if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
        found = f"{DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)}"
        raise SyncFailed(f"{where}: {name} is {found}, the model's is {DTYPE_NAMES[dtype]} {list(shape)}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
