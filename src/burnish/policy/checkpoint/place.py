"""Where checkpoints lie: one small interface, and the local (or shared) file system behind it.

Owns the names, and the order of operations after which a complete checkpoint loads whenever the power goes: a save
writes under another name and takes the final name last; a deletion takes the final name away first. Must not know what
is in a file, nor about threads and ranks: `checkpointer.py` does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Protocol

from burnish.policy.checkpoint.manifest import MANIFEST, decode_manifest
from burnish.policy.checkpoint.storage import Storage


class Draft(Protocol):
    """A checkpoint that is being written, by one rank or by several; no reader sees it."""

    def write(self, file: str, chunks: Iterable[bytes | memoryview]) -> None:
        """One file, durable on return. Every rank writes files of its own. Raises OSError."""
        ...

    def commit(self, manifest: bytes) -> None:
        """Makes the draft the checkpoint of its step, in place of one that has the name. By rank 0, once all files of
        all ranks are durable. Raises OSError; the draft is then to be abandoned."""
        ...

    def abandon(self) -> None:
        """Removes what was written, as far as the disk lets it; never raises. By rank 0, once no rank writes."""
        ...


class Place(Protocol):
    """The checkpoints of one run. A finished one never changes.

    Every OSError but two says something about the files. ConnectionError and TimeoutError say that the place did not
    answer, and nothing about the checkpoint: no older one is taken in its stead.
    """

    def __str__(self) -> str:
        """Where the checkpoints are, for a person."""
        ...

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, ascending. Raises OSError."""
        ...

    def begin(self, step: int, token: str) -> Draft:
        """A new draft; every rank calls it with the same token (hexadecimal, random). Touches nothing yet."""
        ...

    def read(self, step: int, file: str, offset: int = 0, size: int | None = None) -> bytearray:
        """`size` bytes from `offset` (absent: all of the rest), fewer where the file ends before. Raises OSError."""
        ...

    def size(self, step: int, file: str) -> int:
        """Bytes of a file. Raises OSError."""
        ...

    def remove(self, steps: Set[int]) -> None:
        """Deletes; all names go first and durably, so that half of a checkpoint is never seen. Raises OSError."""
        ...

    def clean(self) -> None:
        """Removes what dead writers left, but no draft that was begun here and not ended; makes durable what `steps`
        gives. By the run's owner alone."""
        ...

    def free_bytes(self) -> int | None:
        """What may still be written; None where nobody knows."""
        ...

    def describe(self, step: int) -> str:
        """Where the checkpoint of a step is, for a person."""
        ...


def name_of(step: int) -> str:
    """What the checkpoint of a step is called in every place."""
    return f"checkpoint-{step}"


def step_of(name: str) -> int | None:
    """20 for `checkpoint-20`; None for all else, `checkpoint-20.tmp-1f3a` included."""
    found = re.fullmatch(r"checkpoint-(0|[1-9][0-9]*)", name)
    return int(found[1]) if found else None


_LEFTOVER = re.compile(r"checkpoint-[0-9]+\.(?:tmp|trash)-([0-9a-f]+)")
"""A save or a deletion that is under way or was cut short, with its token."""


class LocalPlace:
    """A run folder. Ranks on several machines share it over a network file system."""

    def __init__(self, run_dir: Path, storage: Storage | None = None) -> None:
        self._run_dir, self._storage = run_dir, storage or Storage()
        self._live: set[str] = set()

    def __str__(self) -> str:
        return str(self._run_dir)

    def steps(self) -> list[int]:
        names = self._storage.names(self._run_dir)
        return sorted(step for name in names if (step := step_of(name)) is not None)

    def begin(self, step: int, token: str) -> LocalDraft:
        self._live.add(token)
        return LocalDraft(self, self._run_dir, self._storage, step, token)

    def end(self, token: str) -> None:
        """Notes that a draft is finished, one way or the other."""
        self._live.discard(token)

    def read(self, step: int, file: str, offset: int = 0, size: int | None = None) -> bytearray:
        return self._storage.read(self._run_dir / name_of(step) / file, offset, size)

    def size(self, step: int, file: str) -> int:
        return self._storage.size(self._run_dir / name_of(step) / file)

    def remove(self, steps: Set[int]) -> None:
        trash = []
        for step in sorted(steps):
            trash.append(self._run_dir / f"{name_of(step)}.trash-{secrets.token_hex(4)}")
            self._storage.rename(self._run_dir / name_of(step), trash[-1])
        if trash:
            self._storage.sync_directory(self._run_dir)
        for path in trash:
            self._storage.remove_flat(path)

    def clean(self) -> None:
        for name in self._storage.names(self._run_dir):
            found = _LEFTOVER.fullmatch(name)
            if found is not None and found[1] not in self._live:
                # What resists stays: no reader sees it, and where it fills the disk the next save says so.
                with contextlib.suppress(OSError):
                    self._storage.remove_flat(self._run_dir / name)
        self._storage.sync_directory(self._run_dir)  # a dead writer may not have come to it after its rename

    def free_bytes(self) -> int | None:
        return self._storage.free_bytes(self._run_dir)

    def describe(self, step: int) -> str:
        return str(self._run_dir / name_of(step))


class LocalDraft:
    """A folder `checkpoint-20.tmp-1f3a`, which the first file of any rank creates."""

    def __init__(self, place: LocalPlace, run_dir: Path, storage: Storage, step: int, token: str) -> None:
        self._place, self._run_dir, self._storage = place, run_dir, storage
        self._step, self._token, self._exists = step, token, False
        self._folder = run_dir / f"{name_of(step)}.tmp-{token}"

    def write(self, file: str, chunks: Iterable[bytes | memoryview]) -> None:
        if not self._exists:
            with contextlib.suppress(FileExistsError):  # by another rank
                self._storage.make_directory(self._folder)
            self._exists = True
        self._storage.write(self._folder / file, chunks)
        self._storage.sync_directory(self._folder)

    def commit(self, manifest: bytes) -> None:
        self._require_files(manifest)
        self.write(MANIFEST, [manifest])
        if self._step in self._place.steps():
            self._place.remove({self._step})
        self._storage.rename(self._folder, self._run_dir / name_of(self._step))
        self._storage.sync_directory(self._run_dir)
        self._place.end(self._token)

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # a failing disk may refuse this too; the next `clean` tries again
            if self._folder.name in self._storage.names(self._run_dir):
                self._storage.remove_flat(self._folder)
        self._place.end(self._token)

    def _require_files(self, manifest: bytes) -> None:
        """Where the folder is not shared, a rank on another machine has written into one of the same name there."""
        for file, facts in decode_manifest(manifest)["files"].items():
            path = self._folder / file
            try:
                size = self._storage.size(path)
            except FileNotFoundError as error:
                reason = f"{os.strerror(errno.ENOENT)}; do all ranks share this file system?"
                raise OSError(errno.ENOENT, reason, str(path)) from error
            if size != facts["size"]:
                raise OSError(errno.EIO, f"{size} bytes, {facts['size']} were written", str(path))
