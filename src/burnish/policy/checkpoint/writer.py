"""Writes, commits and deletes checkpoints so that a complete one loads whenever the power goes.

A save writes into a fresh folder of another name, makes every byte durable, and gives the folder its name last. A
deletion takes the name away first. Must not know about threads or staging: `checkpointer.py` does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from torch import Tensor

from burnish.policy.checkpoint.manifest import (
    DTYPE_NAMES,
    FORMAT,
    MANIFEST,
    STATE,
    Corrupt,
    checkpoint_path,
    encode_header,
    encode_manifest,
    is_leftover,
    step_of,
    tensor_bytes,
)
from burnish.policy.checkpoint.reader import read_checkpoint
from burnish.policy.checkpoint.storage import Storage


def write_checkpoint(
    storage: Storage, run_dir: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: bytes
) -> Path:
    """Commits one checkpoint. One of the same step that is intact stays as it is; a corrupt one is replaced.

    Args:
        tensors: group -> name -> contiguous CPU tensor.
        state: JSON text.

    Raises:
        OSError: disk full, input/output error; nothing is left behind, and every earlier checkpoint is as it was.
    """
    final = checkpoint_path(run_dir, step)
    exists = final.name in storage.names(run_dir)
    if exists and _is_intact(storage, final):
        storage.sync_directory(run_dir)  # its writer may have died between the rename and this
        return final
    _check_space(storage, run_dir, tensors, state)
    fresh = run_dir / f"{final.name}.tmp-{secrets.token_hex(4)}"
    storage.make_directory(fresh)
    try:
        manifest = _write_files(storage, fresh, step, tensors, state)
        storage.write(fresh / MANIFEST, [encode_manifest(manifest)])
        storage.sync_directory(fresh)
        if exists:
            remove_checkpoints(storage, run_dir, {step})
        storage.rename(fresh, final)
    except OSError:
        with contextlib.suppress(OSError):  # a failing disk may refuse this too; the next `clean` tries again
            storage.remove_flat(fresh)
        raise
    storage.sync_directory(run_dir)
    return final


def remove_checkpoints(storage: Storage, run_dir: Path, steps: Set[int]) -> None:
    """Deletes. The names go first and durably: half of a checkpoint is never seen under a checkpoint's name."""
    trash = []
    for step in sorted(steps):
        path = checkpoint_path(run_dir, step)
        trash.append(run_dir / f"{path.name}.trash-{secrets.token_hex(4)}")
        storage.rename(path, trash[-1])
    if trash:
        storage.sync_directory(run_dir)
    for path in trash:
        storage.remove_flat(path)


def prune(storage: Storage, run_dir: Path, newest: int, keep: int, corrupt: Set[int]) -> None:
    """Keeps the last `keep` checkpoints up to `newest`, which was just committed; corrupt ones never count.

    With checkpoints 10, 20 and a corrupt 30, newest 20 and keep 1: only 20 stays, so 30 cannot hide it later.
    """
    steps = {step for name in storage.names(run_dir) if (step := step_of(name)) is not None}
    bad = (steps & corrupt) - {newest}
    good = sorted(step for step in steps - bad if step <= newest)
    remove_checkpoints(storage, run_dir, bad | set(good[:-keep]))


def clean(storage: Storage, run_dir: Path) -> None:
    """Removes what dead writers left behind; only the owner of the run folder may call it.

    What resists stays: no reader sees it, and where it fills the disk the next save says so.
    """
    for name in filter(is_leftover, storage.names(run_dir)):
        with contextlib.suppress(OSError):
            storage.remove_flat(run_dir / name)


def _write_files(
    storage: Storage, folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: bytes
) -> dict[str, Any]:
    manifest: dict[str, Any] = {"format": FORMAT, "step": step, "files": {}, "tensors": {}}
    for group, members in tensors.items():
        name = f"{group}.safetensors"
        header, order = encode_header(members)
        manifest["files"][name] = {
            "size": len(header) + sum(tensor.nbytes for tensor in members.values()),
            "header_size": len(header),
            "header_crc32": zlib.crc32(header),
        }
        described = manifest["tensors"][group] = {}
        storage.write(folder / name, _file_chunks(name, header, order, members, described))
    storage.write(folder / STATE, [state])
    manifest["files"][STATE] = {"size": len(state), "crc32": zlib.crc32(state)}
    return manifest


def _file_chunks(
    file: str, header: bytes, order: list[str], tensors: Mapping[str, Tensor], described: dict[str, Any]
) -> Iterator[bytes | memoryview]:
    """The bytes of a file; describes each tensor in `described` on the way, so that its bytes are touched twice in a
    row, first by the checksum and then, still cached where small, by the write."""
    yield header
    for name in order:
        tensor, shape = tensors[name], list(tensors[name].shape)
        data = tensor_bytes(tensor)
        slices = [{"file": file, "offsets": [0] * len(shape), "shape": shape, "crc32": zlib.crc32(data)}]
        described[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": shape, "slices": slices}
        yield data


def _check_space(storage: Storage, run_dir: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: bytes) -> None:
    needed = len(state) + sum(tensor.nbytes for members in tensors.values() for tensor in members.values())
    free = storage.free_bytes(run_dir)
    if needed > free:
        sizes = f"{needed / 2**20:.1f} MiB needed, {free / 2**20:.1f} MiB free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {sizes}", str(run_dir))


def _is_intact(storage: Storage, path: Path) -> bool:
    try:
        read_checkpoint(storage, path)
    except Corrupt:
        return False
    return True
