"""Reads checkpoints, believes no byte that was not checked, and changes nothing where they lie.

Every checksum is verified at every load: zlib's crc32 runs at about 2.5 GB/s on one core, and none of the usual formats
(safetensors, torch.save, torch.distributed.checkpoint) notices a flipped bit by itself. The slices that were written
and the regions that are wanted need have nothing in common but the tensor: whatever cut it then, and cuts it now.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from burnish.errors import ResumeError, Unreachable
from burnish.policy.checkpoint.index import Index, Slice, Stored, decode
from burnish.policy.checkpoint.manifest import FORMAT, MANIFEST, STATE, Corrupt, decode_manifest
from burnish.policy.checkpoint.place import LocalPlace, Place, name_of
from burnish.policy.checkpoint.storage import Storage
from burnish.policy.checkpoint.together import Alone, Ranks, together
from burnish.region import Region

T = TypeVar("T")

Wanted = Callable[[str, str, tuple[int, ...]], Region | None]
"""(group, name, shape of the whole) of a saved tensor -> the region that this rank takes; None: nothing of it."""


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A checkpoint of which every byte that was read is as it was written; tensors are on the CPU."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    """group -> name -> the region that was wanted"""
    shapes: dict[str, dict[str, tuple[int, ...]]]
    """group -> name -> shape of the whole tensor, of all that were saved"""
    state: dict[str, Any]
    place: str
    """Where it lies, for a person: `runs/sft/checkpoint-20`"""
    rejected: list[str]
    """Newer ones that were passed over: `checkpoint-30: model.safetensors: tensor lm_head.weight: checksum differs`"""

    @property
    def name(self) -> str:
        """`checkpoint-20`"""
        return name_of(self.step)


def everything(group: str, name: str, shape: tuple[int, ...]) -> Region:
    """What is wanted where nothing is cut."""
    return Region.all_of(shape)


def load_latest(
    place: Place | Path,
    storage: Storage | None = None,
    *,
    wanted: Wanted = everything,
    ranks: Ranks | None = None,
    at_most: int | None = None,
) -> LoadedCheckpoint | None:
    """The newest checkpoint that is intact for every rank, all of which must call; None where there is none yet.

    Args:
        place: or a run folder.
        wanted: asked for every saved tensor. Beside the result, memory holds one slice (64 MiB) at a time.
        at_most: no later step than this one.

    Raises:
        ResumeError: there are checkpoints and not one of them is intact, or another version of Burnish wrote the
            newest: going on from an older one would delete it.
        Unreachable: the place does not answer.
    """
    here = LocalPlace(place, storage) if isinstance(place, Path) else place
    all_ranks = ranks or Alone()
    steps = together(all_ranks, lambda: _answered(here.steps) if all_ranks.rank == 0 else [])[0]
    rejected = []
    for step in sorted(steps, reverse=True):
        if at_most is not None and step > at_most:
            continue
        try:
            return _load(here, step, wanted, all_ranks, rejected)
        except Corrupt as error:
            rejected.append(f"{name_of(step)}: {error}")
    if rejected:
        raise ResumeError(
            "no checkpoint is intact: " + "; ".join(rejected),
            where=str(here),
            cure="restore a checkpoint from a copy, or start again with another run_dir",
        )
    return None


def verify(place: Place, step: int) -> int:
    """Reads all of a checkpoint and keeps nothing; returns its bytes.

    Raises:
        Corrupt: naming the file and the tensor.
        ResumeError: it is of another format.
    """
    manifest, _ = _open(place, step)
    index = decode(manifest)
    _check_files(place, step, index, 0, 1)
    for members in index.tensors.values():
        for name, stored in members.items():
            for part in stored.slices:
                _read_slice(place, step, name, stored, part)
    return sum(facts.size for facts in index.files.values())


def _load(place: Place, step: int, wanted: Wanted, ranks: Ranks, rejected: list[str]) -> LoadedCheckpoint:
    opened: Any  # of JSON, as it comes from rank 0
    opened, problem = together(ranks, lambda: _tried(lambda: _open(place, step) if ranks.rank == 0 else None))[0]
    if problem is not None:
        raise Corrupt(problem)
    manifest, state = opened
    tensors: dict[str, dict[str, Tensor]] = {}

    def read() -> str | None:
        index = decode(manifest)
        shapes.update(_shapes(index))
        _check_files(place, step, index, ranks.rank, ranks.world_size)
        for group, members in index.tensors.items():
            regions = {name: wanted(group, name, stored.shape) for name, stored in members.items()}
            tensors[group] = {
                name: _read_region(place, step, name, members[name], region)
                for name, region in regions.items()
                if region is not None
            }
        return None

    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    problems = [problem for _, problem in together(ranks, lambda: _tried(read))]
    if any(problems):
        raise Corrupt(_of_ranks(problems))
    return LoadedCheckpoint(step, tensors, shapes, state, place.describe(step), rejected)


def _of_ranks(problems: list[str | None]) -> str:
    """What each rank met. A file is named by its own name; the rank is the one that read it."""
    if len(problems) == 1:
        return str(problems[0])
    ranks: dict[str, list[str]] = {}
    for rank, problem in enumerate(problems):
        if problem is not None:
            ranks.setdefault(problem, []).append(str(rank))
    return "; ".join(f"{problem} (read by rank {', '.join(who)})" for problem, who in ranks.items())


def _tried(work: Callable[[], T]) -> tuple[T | None, str | None]:
    """(result, None) or (None, what is corrupt)."""
    try:
        return work(), None
    except Corrupt as error:
        return None, str(error)


def _open(place: Place, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(manifest, state)."""
    manifest = decode_manifest(_read(place, step, MANIFEST))
    if manifest["format"] != FORMAT:
        raise ResumeError(
            f"{MANIFEST}: format {manifest['format']}; this version of Burnish reads format {FORMAT}",
            where=place.describe(step),
            cure="resume with the version of Burnish that wrote it",
        )
    if manifest["step"] != step:
        raise Corrupt(f"{MANIFEST}: is of step {manifest['step']}")
    facts = decode(manifest).files.get(STATE)
    if facts is None:
        raise Corrupt(f"{MANIFEST}: names no {STATE}")
    state = _read(place, step, STATE)
    if len(state) != facts.size or zlib.crc32(state) != facts.crc32:
        raise Corrupt(f"{STATE}: checksum differs")
    return manifest, json.loads(state)


def _check_files(place: Place, step: int, index: Index, rank: int, world_size: int) -> None:
    """Every file's size and head are looked at by one of the ranks, whether a slice of it is wanted or not."""
    for file, facts in list(index.files.items())[rank::world_size]:
        try:
            size = _opened(file, lambda file=file: place.size(step, file))
        except Corrupt as error:
            raise Corrupt(f"{error}{_lost(index, file, 0)}") from error
        if size != facts.size:
            intact = size if size < facts.size else 0  # of a longer one nobody knows where bytes came in
            raise Corrupt(f"{file}: {size} bytes, {facts.size} were written{_lost(index, file, intact)}")
        if zlib.crc32(_read(place, step, file, 0, facts.head)) != facts.crc32:
            raise Corrupt(f"{file}: header: checksum differs{_lost(index, file, 0)}")


def _lost(index: Index, file: str, size: int) -> str:
    """Names the tensors with bytes of the file from `size` on: `; of tensors a, b and 3 more`."""
    names = [
        name
        for members in index.tensors.values()
        for name, stored in members.items()
        if any(part.file == file and part.begin + stored.num_bytes(part) > size for part in stored.slices)
    ]
    if not names:
        return ""
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"; of tensor{'s' * (len(names) > 1)} {', '.join(names[:2])}{more}"


def _read_region(place: Place, step: int, name: str, stored: Stored, region: Region) -> Tensor:
    assert region.whole == stored.shape, f"a region of {region.whole} is wanted of {name}, which is {stored.shape}"
    result = None
    for part in stored.slices:
        common = part.region.overlap(region)
        if common is None:
            continue
        piece = _read_slice(place, step, name, stored, part)
        if part.region == region:
            return piece
        result = torch.empty(region.lengths, dtype=stored.dtype) if result is None else result
        result[common.within(region)] = piece[common.within(part.region)]
        del piece  # before the next one is read
    return torch.empty(region.lengths, dtype=stored.dtype) if result is None else result


def _read_slice(place: Place, step: int, name: str, stored: Stored, part: Slice) -> Tensor:
    num_bytes = stored.num_bytes(part)
    data = _read(place, step, part.file, part.begin, num_bytes)
    if len(data) != num_bytes:
        raise Corrupt(f"{part.file}: tensor {name}: {len(data)} bytes, {num_bytes} were written")
    if zlib.crc32(data) != part.crc32:
        raise Corrupt(f"{part.file}: tensor {name}: checksum differs")
    return torch.frombuffer(data, dtype=stored.dtype).reshape(part.region.lengths)


def _read(place: Place, step: int, file: str, offset: int = 0, size: int | None = None) -> bytearray:
    return _opened(file, lambda: place.read(step, file, offset, size))


def _opened(file: str, work: Callable[[], T]) -> T:
    try:
        return _answered(work)
    except OSError as error:
        raise Corrupt(f"{file}: {error.strerror or error}") from error


def _answered(work: Callable[[], T]) -> T:
    """A place that does not answer, or lets nobody in, says nothing about its checkpoints: an older one is not taken,
    for it would sooner or later replace what may be intact."""
    try:
        return work()
    except (ConnectionError, TimeoutError) as error:
        raise Unreachable(f"the checkpoints cannot be read: {error}; the same command tries again") from error
    except PermissionError as error:
        raise ResumeError(f"the checkpoints cannot be read: {error}", cure="let this user read them") from error


def _shapes(index: Index) -> dict[str, dict[str, tuple[int, ...]]]:
    return {group: {name: stored.shape for name, stored in members.items()} for group, members in index.tensors.items()}
