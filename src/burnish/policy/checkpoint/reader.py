"""Reads checkpoints, believes no byte that was not checked, and changes nothing on the disk.

Every tensor's checksum is verified at every load: zlib's crc32 runs at about 2.5 GB/s on one core, and none of the
usual formats (safetensors, torch.save, torch.distributed.checkpoint) notices a flipped bit by itself.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.errors import ResumeError
from burnish.policy.checkpoint.manifest import (
    DTYPES,
    FORMAT,
    MANIFEST,
    STATE,
    Corrupt,
    decode_header,
    decode_manifest,
    step_of,
)
from burnish.policy.checkpoint.storage import Storage


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A checkpoint of which every byte is as it was written; tensors are on the CPU."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    """group -> name -> tensor"""
    state: dict[str, Any]
    path: Path
    rejected: list[str]
    """Newer ones that were passed over: `checkpoint-30: model.safetensors: tensor lm_head.weight: checksum differs`"""


def load_latest(run_dir: Path, storage: Storage | None = None) -> LoadedCheckpoint | None:
    """The newest intact checkpoint; None where a run has none yet.

    Raises:
        ResumeError: there are checkpoints and not one of them is intact, or another version of Burnish wrote the
            newest: going on from an older one would delete it.
    """
    storage = storage or Storage()
    rejected = []
    steps = [step for name in storage.names(run_dir) if (step := step_of(name)) is not None]
    for step in sorted(steps, reverse=True):
        path = run_dir / f"checkpoint-{step}"
        try:
            tensors, state = read_checkpoint(storage, path)
        except Corrupt as error:
            rejected.append(f"{path.name}: {error}")
            continue
        return LoadedCheckpoint(step, tensors, state, path, rejected)
    if rejected:
        raise ResumeError(
            "no checkpoint is intact: " + "; ".join(rejected),
            where=str(run_dir),
            cure="restore a checkpoint folder from a copy, or start again with another run_dir",
        )
    return None


def read_checkpoint(storage: Storage, path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by group and name, and the state.

    Raises:
        Corrupt: naming the file and the tensor; an unreadable file counts as corrupt.
        ResumeError: it is of another format.
    """
    manifest = decode_manifest(_read(storage, path / MANIFEST))
    if manifest["format"] != FORMAT:
        raise ResumeError(
            f"{MANIFEST}: format {manifest['format']}; this version of Burnish reads format {FORMAT}",
            where=str(path),
            cure="resume with the version of Burnish that wrote it",
        )
    if manifest["step"] != step_of(path.name):
        raise Corrupt(f"{MANIFEST}: is of step {manifest['step']}")
    layouts = {}
    for name, written in manifest["files"].items():
        size = _size(storage, path / name)
        if size != written["size"]:
            raise Corrupt(f"{name}: {size} bytes, {written['size']} were written")
        if "header_size" in written:
            header = _read(storage, path / name, 0, written["header_size"])
            if zlib.crc32(header) != written["header_crc32"]:
                raise Corrupt(f"{name}: header: checksum differs")
            layouts[name] = decode_header(header)
    state = _read(storage, path / STATE)
    if zlib.crc32(state) != manifest["files"][STATE]["crc32"]:
        raise Corrupt(f"{STATE}: checksum differs")
    tensors = {
        group: {name: _read_tensor(storage, path, name, described, layouts) for name, described in members.items()}
        for group, members in manifest["tensors"].items()
    }
    return tensors, json.loads(state)


def _read_tensor(
    storage: Storage, path: Path, name: str, described: dict[str, Any], layouts: dict[str, dict[str, tuple[int, int]]]
) -> Tensor:
    dtype, shape = DTYPES[described["dtype"]], described["shape"]
    whole = None
    for part in described["slices"]:
        data = _read(storage, path / part["file"], *layouts[part["file"]][name])
        if zlib.crc32(data) != part["crc32"]:
            raise Corrupt(f"{part['file']}: tensor {name}: checksum differs")
        # frombuffer refuses an empty buffer.
        piece = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        piece = piece.reshape(part["shape"])
        if part["shape"] == shape:
            return piece
        whole = torch.empty(shape, dtype=dtype) if whole is None else whole
        region = zip(part["offsets"], part["shape"], strict=True)
        whole[tuple(slice(begin, begin + length) for begin, length in region)] = piece
    assert whole is not None, f"tensor {name} has no slice"
    return whole


def _read(storage: Storage, path: Path, offset: int = 0, size: int | None = None) -> bytearray:
    try:
        return storage.read(path, offset, size)
    except OSError as error:
        raise Corrupt(f"{path.name}: {error.strerror}") from error


def _size(storage: Storage, path: Path) -> int:
    try:
        return storage.size(path)
    except OSError as error:
        raise Corrupt(f"{path.name}: {error.strerror}") from error
