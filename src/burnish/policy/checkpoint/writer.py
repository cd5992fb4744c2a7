"""Writes one rank's files of a checkpoint, and says what is where.

Checksums are computed in a thread of their own beside the write: crc32 runs at 2.5 GB/s, and both let go of the
interpreter's lock. Must not know about other ranks, staging or commits: `checkpointer.py` does.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from burnish.model.tensor_bytes import tensor_bytes
from burnish.policy.checkpoint.index import FileFacts, Index, Slice, Stored
from burnish.policy.checkpoint.manifest import STATE, encode_header
from burnish.policy.checkpoint.piece import Piece
from burnish.policy.checkpoint.place import Draft
from burnish.region import Region

SLICE_BYTES = 64 * 2**20
"""Longest stretch under one checksum: a reader needs as much memory beside its result, and reads no more than it needs
of a tensor that is cut differently now."""


def write_part(
    draft: Draft, rank: int, num_ranks: int, staged: Mapping[str, Mapping[str, Piece]], state: bytes
) -> Index:
    """Makes this rank's files durable. A group of which it writes nothing has no file of it, unless it is rank 0.

    Args:
        staged: group -> name -> what this rank writes: contiguous, on the CPU, unchanging.
        state: JSON text, which rank 0 alone writes.

    Raises:
        OSError: disk full, input/output error.
    """
    index = Index({}, {})
    with ThreadPoolExecutor(1, thread_name_prefix="checksum") as hasher:
        for group, members in staged.items():
            if members or rank == 0:
                file = (
                    f"{group}.safetensors" if num_ranks == 1 else f"{group}-{rank + 1:05}-of-{num_ranks:05}.safetensors"
                )
                _write_file(draft, file, group, members, index, hasher)
        if rank == 0:
            index.files[STATE] = FileFacts(len(state), len(state), zlib.crc32(state))
            draft.write(STATE, [state])
    return index


class _Stretch(NamedTuple):
    name: str
    region: Region
    data: memoryview


def _write_file(
    draft: Draft, file: str, group: str, members: Mapping[str, Piece], index: Index, hasher: ThreadPoolExecutor
) -> None:
    header, order = encode_header({name: piece.tensor for name, piece in members.items()})
    stretches = [stretch for name in order for stretch in _stretches(name, members[name])]
    checksums = hasher.submit(lambda: [zlib.crc32(stretch.data) for stretch in stretches])
    draft.write(file, [header, *(stretch.data for stretch in stretches)])
    begin = len(header)
    tensors = index.tensors[group] = {
        name: Stored(piece.tensor.dtype, piece.region.whole, []) for name, piece in members.items()
    }
    for stretch, checksum in zip(stretches, checksums.result(), strict=True):
        tensors[stretch.name].slices.append(Slice(file, begin, stretch.region, checksum))
        begin += len(stretch.data)
    index.files[file] = FileFacts(begin, len(header), zlib.crc32(header))


def _stretches(name: str, piece: Piece) -> Iterator[_Stretch]:
    """The bytes of a piece, cut between rows into at most SLICE_BYTES; none of an empty one."""
    data, region = tensor_bytes(piece.tensor), piece.region
    if len(data) <= SLICE_BYTES:
        if len(data):
            yield _Stretch(name, region, data)
        return
    row_bytes = len(data) // region.lengths[0]
    rows = max(1, SLICE_BYTES // row_bytes)
    for first in range(0, region.lengths[0], rows):
        count = min(rows, region.lengths[0] - first)
        offsets = (region.offsets[0] + first, *region.offsets[1:])
        box = Region(region.whole, offsets, (count, *region.lengths[1:]))
        yield _Stretch(name, box, data[first * row_bytes : (first + count) * row_bytes])
