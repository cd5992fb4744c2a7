"""Every file operation of the checkpoints, behind one small class.

Owns what "durable" means: a file's bytes survive a power cut after `sync`, its name after `sync_directory` of its
folder. Must not know what a checkpoint is. Another place to keep checkpoints, or a disk that fails on purpose in a
test, is a subclass; each method under "changing" is one moment at which the power can go.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


class Storage:
    """The local disk."""

    # reading

    def names(self, directory: Path) -> list[str]:
        """What the directory holds, sorted; empty where there is no such directory."""
        return sorted(os.listdir(directory)) if directory.is_dir() else []

    def size(self, path: Path) -> int:
        """Bytes of a file."""
        return path.stat().st_size

    def read(self, path: Path, offset: int = 0, size: int | None = None) -> bytearray:
        """`size` bytes from `offset` (absent: all of the rest), fewer where the file ends before. Writable, no copy."""
        with open(path, "rb", buffering=0) as file:
            data = bytearray(self.size(path) - offset if size is None else size)
            file.seek(offset)
            filled = 0
            with memoryview(data) as view:
                # One read returns at most 2 GiB - 4 KiB on Linux.
                while filled < len(view) and (count := file.readinto(view[filled:])):
                    filled += count
            del data[filled:]
            return data

    def free_bytes(self, directory: Path) -> int:
        """What this user may still write there."""
        disk = os.statvfs(directory)
        return disk.f_bavail * disk.f_frsize

    # changing

    def make_directory(self, path: Path) -> None:
        path.mkdir()

    def create(self, path: Path) -> int:
        """A new, empty file, open for `append`; refuses one that exists."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def append(self, file: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while len(view):
            view = view[os.write(file, view) :]

    def sync(self, file: int) -> None:
        """Returns when the file's bytes are on the disk."""
        os.fsync(file)

    def close(self, file: int) -> None:
        os.close(file)

    def sync_directory(self, path: Path) -> None:
        """Returns when the names in the directory (created, renamed, removed) are on the disk."""
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def rename(self, old: Path, new: Path) -> None:
        """Atomic, within one directory; `new` does not exist."""
        os.rename(old, new)

    def remove_file(self, path: Path) -> None:
        path.unlink()

    def remove_directory(self, path: Path) -> None:
        """An empty one."""
        path.rmdir()

    # composed of the above

    def write(self, path: Path, chunks: Iterable[bytes | memoryview]) -> None:
        """A new file of these bytes, which are durable on return; its name is not yet."""
        file = self.create(path)
        try:
            for chunk in chunks:
                self.append(file, chunk)
            self.sync(file)
        except OSError as error:
            error.filename = str(path)  # "No space left on device: '/.../model.safetensors'"
            raise
        finally:
            self.close(file)

    def remove_flat(self, directory: Path) -> None:
        """A directory and the files in it; a checkpoint has no folders inside."""
        for name in self.names(directory):
            self.remove_file(directory / name)
        self.remove_directory(directory)
