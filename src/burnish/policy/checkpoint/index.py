"""What a manifest says, as types: which bytes of which file are which box of which tensor.

Also what one rank says about the files that it wrote; the whole is the sum of those. Must not know how files are
written or read.
"""

from __future__ import annotations

import base64
import json
import math
import re
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from burnish.model.tensor_bytes import DTYPES
from burnish.policy.checkpoint.manifest import FORMAT, MANIFEST, Corrupt, encode_manifest
from burnish.region import Region


class FileFacts(NamedTuple):
    """The first `head` bytes of a file stand under `crc32`, the rest under its slices' checksums."""

    size: int
    head: int
    crc32: int


class Slice(NamedTuple):
    """A box of a tensor, and the `num_bytes` of `file` from `begin` that hold it."""

    file: str
    begin: int
    region: Region
    crc32: int


class Stored(NamedTuple):
    """A tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    slices: list[Slice]

    def num_bytes(self, part: Slice) -> int:
        """Of one slice."""
        return part.region.numel * self.dtype.itemsize


class Index(NamedTuple):
    """Files by name, tensors by group and name: of a checkpoint, or of what one rank wrote of it."""

    files: dict[str, FileFacts]
    tensors: dict[str, dict[str, Stored]]

    def problem(self) -> str | None:
        """What keeps the slices from being the whole of every tensor, inside their files; None where they are."""
        for members in self.tensors.values():
            for name, stored in members.items():
                regions = [part.region for part in stored.slices]
                # Boxes inside the whole, no two at one place, of as many elements: they tile it.
                held = sum(region.numel for region in regions)
                if held != math.prod(stored.shape) or len({region.offsets for region in regions}) < len(regions):
                    return f"the slices of tensor {name} are not the whole of it: {held} of {math.prod(stored.shape)}"
                for part in stored.slices:
                    end, facts = part.begin + stored.num_bytes(part), self.files[part.file]
                    if not _is_inside(part.region) or part.begin < facts.head or end > facts.size:
                        return f"a slice of tensor {name} lies outside of it or of {part.file}"
        return None


def merge(parts: Iterable[Index]) -> Index:
    """What all ranks wrote, in the order of ranks. No two have a file in common."""
    whole = Index({}, {})
    for part in parts:
        assert not part.files.keys() & whole.files.keys(), "two ranks wrote one file"
        whole.files.update(part.files)
        for group, members in part.tensors.items():
            merged = whole.tensors.setdefault(group, {})
            for name, stored in members.items():
                known = merged.setdefault(name, Stored(stored.dtype, stored.shape, []))
                assert known[:2] == stored[:2], f"{name} is {known[:2]} on one rank and {stored[:2]} on another"
                known.slices.extend(stored.slices)
    return whole


def to_json(index: Index) -> dict[str, Any]:
    """As in a manifest."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    tensors = {
        group: {
            name: {"dtype": names[stored.dtype], "shape": stored.shape, "slices": list(map(_slice_json, stored.slices))}
            for name, stored in members.items()
        }
        for group, members in index.tensors.items()
    }
    return {"files": {name: facts._asdict() for name, facts in index.files.items()}, "tensors": tensors}


def from_json(described: dict[str, Any]) -> Index:
    """Of what `to_json` gave."""
    files = {name: FileFacts(**facts) for name, facts in described["files"].items()}
    tensors = {
        group: {name: _stored(stored) for name, stored in members.items()}
        for group, members in described["tensors"].items()
    }
    return Index(files, tensors)


def pack(index: Index) -> str:
    """As a short text that ranks can exchange: 15 kB for 900 tensors, where the JSON is 200 kB, once for each rank."""
    return base64.b64encode(zlib.compress(json.dumps(to_json(index)).encode())).decode()


def unpack(text: str) -> Index:
    """What was packed."""
    return from_json(json.loads(zlib.decompress(base64.b64decode(text))))


def encode(index: Index, step: int) -> bytes:
    """The manifest of a checkpoint."""
    return encode_manifest({"format": FORMAT, "step": step} | to_json(index))


def decode(manifest: dict[str, Any]) -> Index:
    """The manifest of a checkpoint of this format, read with distrust: a checksum keeps bits from flipping, not a
    person from writing a manifest.

    Raises:
        Corrupt: it is not what `encode` writes.
    """
    try:
        index = from_json(manifest)
        problem = index.problem()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Corrupt(f"{MANIFEST}: is not a manifest of format {FORMAT}: {json.dumps(str(error))}") from error
    outside = [name for name in index.files if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) is None]
    if outside:
        problem = f"names {outside[0]!r}, which is no file beside it"
    if problem is not None:
        raise Corrupt(f"{MANIFEST}: {problem}")
    return index


def _slice_json(part: Slice) -> dict[str, Any]:
    offsets, shape = part.region.offsets, part.region.lengths
    return {"file": part.file, "begin": part.begin, "offsets": offsets, "shape": shape, "crc32": part.crc32}


def _stored(described: dict[str, Any]) -> Stored:
    shape = tuple(described["shape"])
    slices = [
        Slice(part["file"], part["begin"], Region(shape, tuple(part["offsets"]), tuple(part["shape"])), part["crc32"])
        for part in described["slices"]
    ]
    return Stored(DTYPES[described["dtype"]], shape, slices)


def _is_inside(region: Region) -> bool:
    spans = zip(region.whole, region.offsets, region.lengths, strict=True)
    return all(begin >= 0 and length > 0 and begin + length <= size for size, begin, length in spans)
