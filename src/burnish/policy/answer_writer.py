"""Writing what a second model said: files of answers in a folder that appears when all of it is there.

It must not know who answers. The format is that of `answers.py`.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.errors import DataError
from burnish.model.tensor_bytes import tensor_bytes
from burnish.policy.answers import KEY_BYTES, STORED, file_name
from burnish.policy.checkpoint.manifest import MANIFEST, encode_header, encode_manifest
from burnish.policy.checkpoint.storage import Storage

FILE_BYTES = 256 * 2**20
"""Size of a file, about: so much is in memory before it is written."""


class Writer:
    """Files in a folder of another name, which becomes `folder` at the end.

    Args:
        file_bytes: a file is finished once it holds as much.

    Raises:
        DataError: the folder holds something else, or cannot be written; by every method.
    """

    def __init__(self, folder: Path, file_bytes: int = FILE_BYTES, storage: Storage | None = None) -> None:
        # A checkpoint has a manifest, too.
        if folder.exists() and not ((folder / MANIFEST).exists() and (folder / file_name(0)).exists()):
            reason = "the folder exists and holds something else"
            raise DataError(reason, str(folder), "name another folder, or remove this one")
        self.folder, self.partial = folder, folder.with_name(f"{folder.name}.partial")
        self._file_bytes = file_bytes
        self._storage, self._files = storage or Storage(), {}
        with self._written():
            if self.partial.exists():
                shutil.rmtree(self.partial)  # a pass that was cut short
            self.partial.mkdir(parents=True)
        self._columns: dict[str, list[int]] = {}
        self._keys: list[bytes] = []
        self._values: dict[str, list[Tensor]] = {}
        self._bytes = 0

    def add(self, key: bytes, values: Mapping[str, Tensor]) -> None:
        """One document's answers at its trained tokens."""
        self._columns = {name: list(value.shape[1:]) for name, value in values.items()}
        self._keys.append(key)
        for name, value in values.items():
            kept = value.to(STORED.get(name, value.dtype))
            self._values.setdefault(name, []).append(kept)
            self._bytes += kept.nbytes
        if self._bytes >= self._file_bytes:
            with self._written():
                self._write()

    def commit(self, facts: dict[str, Any]) -> None:
        """Makes all of it durable, then gives it its name. What had that name is removed last: whenever the power goes,
        one of the two is whole."""
        with self._written():
            if self._keys:
                self._write()
            manifest = encode_manifest(facts | {"columns": self._columns, "files": self._files})
            self._storage.write(self.partial / MANIFEST, [manifest])
            self._storage.sync_directory(self.partial)
            old = self.folder.with_name(f".{self.folder.name}.old")
            if self.folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                self._storage.rename(self.folder, old)
            self._storage.rename(self.partial, self.folder)
            self._storage.sync_directory(self.folder.parent)
            shutil.rmtree(old, ignore_errors=True)

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = f"cannot be written: {error.strerror}"
            raise DataError(reason, error.filename or str(self.folder), "free some space, or name another") from error

    def _write(self) -> None:
        first = next(iter(self._values.values()))
        tensors = {name: torch.cat(values) for name, values in self._values.items()}
        tensors["keys"] = torch.frombuffer(bytearray(b"".join(self._keys)), dtype=torch.uint8).reshape(-1, KEY_BYTES)
        tensors["ends"] = torch.tensor([len(value) for value in first]).cumsum(0)
        header, order = encode_header(tensors)
        name = file_name(len(self._files))
        chunks = [header, *(tensor_bytes(tensors[tensor]) for tensor in order)]
        checksum = 0
        for chunk in chunks:
            checksum = zlib.crc32(chunk, checksum)
        self._storage.write(self.partial / name, chunks)
        self._files[name] = {"size": sum(memoryview(chunk).nbytes for chunk in chunks), "crc32": checksum}
        self._keys, self._values, self._bytes = [], {}, 0
