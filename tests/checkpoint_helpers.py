"""A disk in memory that can lose power or fail at any operation, after ALICE (Pillai et al., OSDI 2014).

What was not synced at a power cut may be there or not, independently: each name created, renamed or removed since its
directory was last synced, and the bytes written since a file was last synced (none, half, all, or as many zeros).
"""

from __future__ import annotations

import copy
import errno
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from burnish.policy.checkpoint import Storage

RUN = Path("run")


class PowerCut(BaseException):
    """Not an Exception: no recovery code runs on a machine without power."""


@dataclass
class File:
    data: bytes = b""
    durable: bytes = b""


@dataclass
class Folder:
    entries: dict[str, File | Folder] = field(default_factory=dict)
    durable: dict[str, File | Folder] = field(default_factory=dict)
    pending: list[Callable[[dict], None]] = field(default_factory=list)

    def change(self, operation: Callable[[dict], None]) -> None:
        operation(self.entries)
        self.pending.append(operation)


class MemoryDisk(Storage):
    """`cut_at=7`: the power goes before the operation 7 (from 0). `fail_at=7`: that one raises OSError instead."""

    def __init__(self, root: Folder | None = None, *, cut_at: int | None = None, fail_at: int | None = None) -> None:
        self.root = root or Folder({RUN.name: Folder()}, {RUN.name: Folder()})
        if root is None:
            self.root.durable = dict(self.root.entries)
        self.cut_at, self.fail_at, self.operations, self.free = cut_at, fail_at, 0, 1 << 40
        self._open: dict[int, File] = {}

    def _step(self) -> None:
        if self.cut_at is not None and self.operations >= self.cut_at:
            raise PowerCut
        self.operations += 1
        if self.fail_at == self.operations - 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    def _find(self, path: Path) -> File | Folder:
        found: File | Folder = self.root
        for part in path.parts:
            if not isinstance(found, Folder) or part not in found.entries:
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
            found = found.entries[part]
        return found

    def _folder(self, path: Path) -> Folder:
        found = self._find(path)
        assert isinstance(found, Folder)
        return found

    def _file(self, path: Path) -> File:
        found = self._find(path)
        assert isinstance(found, File)
        return found

    def names(self, directory: Path) -> list[str]:
        return sorted(self._folder(directory).entries)

    def size(self, path: Path) -> int:
        return len(self._file(path).data)

    def read(self, path: Path, offset: int = 0, size: int | None = None) -> bytearray:
        data = self._file(path).data[offset:]
        return bytearray(data if size is None else data[:size])

    def free_bytes(self, directory: Path) -> int:
        return self.free

    def make_directory(self, path: Path) -> None:
        self._step()
        if path.name in self._folder(path.parent).entries:
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        folder = Folder()
        self._folder(path.parent).change(lambda entries: entries.update({path.name: folder}))

    def create(self, path: Path) -> int:
        self._step()
        file = File()
        self._folder(path.parent).change(lambda entries: entries.update({path.name: file}))
        self._open[len(self._open)] = file
        return len(self._open) - 1

    def append(self, file: int, data: bytes | memoryview) -> None:
        self._step()
        self._open[file].data += bytes(data)

    def sync(self, file: int) -> None:
        self._step()
        self._open[file].durable = self._open[file].data

    def close(self, file: int) -> None:
        pass

    def sync_directory(self, path: Path) -> None:
        self._step()
        folder = self._folder(path)
        folder.durable, folder.pending = dict(folder.entries), []

    def rename(self, old: Path, new: Path) -> None:
        self._step()
        assert old.parent == new.parent and new.name not in self.names(new.parent)
        moved = self._find(old)

        def move(entries: dict) -> None:
            entries.pop(old.name, None)
            entries[new.name] = moved

        self._folder(old.parent).change(move)

    def remove_file(self, path: Path) -> None:
        self._step()
        assert isinstance(self._find(path), File)
        self._folder(path.parent).change(lambda entries: entries.pop(path.name, None))

    def remove_directory(self, path: Path) -> None:
        self._step()
        assert not self.names(path), "rmdir of a directory that is not empty"
        self._folder(path.parent).change(lambda entries: entries.pop(path.name, None))

    def after_power_cut(self) -> Iterator[MemoryDisk]:
        """Every disk that a machine may find when it starts again."""
        for how in ("none", "half", "all", "zeros"):
            for folder in _images(self.root, how):
                yield MemoryDisk(copy.deepcopy(folder))  # images share what they have in common


def _images(folder: Folder, how: str, *, unread: bool = False) -> Iterator[Folder]:
    """Of a folder that no reader looks into, two do: nothing of what was not synced happened, or all of it."""
    seen, num_pending = set(), len(folder.pending)
    extremes = [(False,) * num_pending, (True,) * num_pending]
    for chosen in extremes if unread else itertools.product((False, True), repeat=num_pending):
        entries = dict(folder.durable)
        for operation, happened in zip(folder.pending, chosen, strict=True):
            if happened:
                operation(entries)
        key = tuple(sorted((name, id(entry)) for name, entry in entries.items()))
        if key in seen:
            continue
        seen.add(key)
        choices = [
            list(_images(entry, how, unread=".trash-" in name)) if isinstance(entry, Folder) else [_image(entry, how)]
            for name, entry in entries.items()
        ]
        for contents in itertools.product(*choices):
            image = dict(zip(entries, contents, strict=True))
            yield Folder(image, dict(image))


def _image(file: File, how: str) -> File:
    lost = len(file.data) - len(file.durable)
    kept = {
        "none": file.durable,
        "half": file.data[: len(file.durable) + lost // 2],
        "all": file.data,
        "zeros": file.durable + bytes(lost),
    }[how]
    return File(kept, kept)


def tensors_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """Small and different at every step."""
    return {
        "model": {"embed.weight": torch.arange(6.0).reshape(2, 3) + step, "norm.bias": torch.tensor(step / 3)},
        "rng": {"torch": torch.tensor([step, 255 - step], dtype=torch.uint8)},
    }


def assert_is_step(tensors: dict[str, dict[str, torch.Tensor]], step: int) -> None:
    """Bit for bit what `tensors_of(step)` is."""
    expected = tensors_of(step)
    assert {group: set(members) for group, members in tensors.items()} == {g: set(m) for g, m in expected.items()}
    for group, members in expected.items():
        for name, tensor in members.items():
            found = tensors[group][name]
            assert found.dtype == tensor.dtype and found.shape == tensor.shape and torch.equal(found, tensor)
