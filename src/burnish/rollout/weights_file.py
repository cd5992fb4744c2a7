"""A version of the weights as a folder: what the transports over a file system have in common.

    ROOT/base/                      configuration and tokenizer, copied once
    ROOT/000007-12/                 version 7, the twelfth that was sent; it appears under this name when it is whole
        model.safetensors           or adapter_model.safetensors, for an adapter alone, with PEFT's names
        config.json -> ../base/...  so that the folder is one that transformers, PEFT and vLLM read

The listing of `weights.py` stands in the file's own metadata, its digest and the header's checksum in the parcel. The
last two versions are kept.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
import socket
import time
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from burnish.errors import SyncFailed
from burnish.model.adapters.weights import peft_name
from burnish.model.tensor_bytes import DTYPE_NAMES, tensor_bytes
from burnish.rollout.fleet import idle
from burnish.rollout.weights import Entry, Listing

if TYPE_CHECKING:
    from burnish.rollout.engine import Weights

HEADER_BYTES = 2**20
"""Kept free in front of the tensors: the header is known after them. It holds some 5,000 tensors; for more, what was
written is moved."""
MOVED_BYTES = 64 * 2**20
KEPT = 2


class FolderSender:
    """Writes each version into a folder of its own under `root`, which it owns.

    Args:
        durable: bytes and names are on the disk before a parcel is returned; another machine then sees them too.
    """

    def __init__(self, root: Path, *, durable: bool, release: Callable[[], None] = lambda: None) -> None:
        self.root, self._durable, self._release = root, durable, release
        self._started, self._sent = time.time_ns(), 0
        self._base: Path | None = None
        self._versions: deque[tuple[int, Path]] = deque()

    def send(
        self, version: int, tensors: Iterator[tuple[str, Tensor]], *, adapter_only: bool, folder: Path | None
    ) -> dict[str, Any]:
        """See `Sender`."""
        self._sent += 1
        to, partial = self.root / f"{version:06}-{self._sent}", self.root / ".partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            if folder is not None and folder != self._base:
                copy_base(folder, self.root / "base")
                self._base = folder
            written = write_version(partial, tensors, adapter_only=adapter_only, durable=self._durable)
            if self._base is not None:
                link_base(self.root / "base", partial)
            os.rename(partial, to)
            if self._durable:
                _sync_folder(self.root)
        except OSError as error:
            for _ in tensors:  # the other ranks take part in gathering them
                pass
            shutil.rmtree(partial, ignore_errors=True)
            raise SyncFailed(f"weights of version {version} cannot be written: {_said(error, self.root)}") from error
        self._versions.append((version, to))
        while len(self._versions) > KEPT:
            shutil.rmtree(self._versions.popleft()[1], ignore_errors=True)
        listing = written.listing
        facts = {"digest": listing.digest, "num_bytes": listing.num_bytes, "adapter_only": adapter_only}
        place = {"folder": str(to), "host": socket.gethostname(), "head_crc32": written.head_crc32}
        return {"version": version, "sender": self._started, **facts, **place}

    def forget(self, version: int) -> None:
        """See `Sender`."""
        while self._versions and self._versions[0][0] < version:
            shutil.rmtree(self._versions.popleft()[1], ignore_errors=True)

    def close(self) -> None:
        """Leaves nothing."""
        shutil.rmtree(self.root, ignore_errors=True)
        release, self._release = self._release, lambda: None
        release()


class FolderReceiver:
    """Opens the folders of parcels.

    Args:
        mapped: tensors are the file's pages, without a copy; for files in memory, which nobody can cut off.
    """

    def __init__(self, *, mapped: bool) -> None:
        self._mapped, self._newest = mapped, Newest()

    def receive(self, parcel: dict[str, Any], alive: Callable[[], None] = idle) -> Weights:
        """See `Receiver`."""
        self._newest.require(parcel)
        return FileWeights(parcel, mapped=self._mapped, alive=alive)

    def close(self) -> None:
        """Holds nothing open."""


class Newest:
    """The newest parcel that a receiver has seen."""

    def __init__(self) -> None:
        self._seen: tuple[int, int] = (0, -1)
        self._digest = ""

    def require(self, parcel: dict[str, Any]) -> None:
        """Notes a parcel.

        Raises:
            SyncFailed: it is older than one before, or of equal version and other weights. A sender that was started
                later may begin anew: after a resume its versions are those of the checkpoint.
        """
        place, version = (parcel["sender"], parcel["version"]), parcel["version"]
        if place < self._seen:
            raise SyncFailed(f"weights of version {version} came after those of version {self._seen[1]}: they are old")
        if place == self._seen and parcel["digest"] != self._digest:
            raise SyncFailed(f"weights of version {version} came twice, with other values")
        self._seen, self._digest = place, parcel["digest"]


class FileWeights:
    """The weights of a folder that a `FolderSender` wrote, or `write_version`.

    Raises:
        SyncFailed: it is not there, cut short, or not what the parcel says.
    """

    def __init__(self, parcel: dict[str, Any], *, mapped: bool, alive: Callable[[], None]) -> None:
        self._alive = alive
        self.version: int = parcel["version"]
        self.digest: str = parcel["digest"]
        self.adapter_only: bool = parcel["adapter_only"]
        self._folder = Path(parcel["folder"])
        self._path = self._folder / _file_name(self.adapter_only)
        self._where = f"weights of version {self.version} in {self._folder}"
        try:
            self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._file)
            self._size = os.fstat(self._file).st_size
        except OSError as error:
            cure = "" if parcel["host"] == socket.gethostname() else _cure(parcel["host"])
            raise SyncFailed(f"{self._where}: {error.strerror}{cure}") from error
        self._begins, self._listing = self._opened(parcel["head_crc32"])
        self._map = mmap.mmap(self._file, 0, access=mmap.ACCESS_COPY) if mapped and self._size else None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Weights`; each is checked before it is given out."""
        for name, entry in self._listing.entries.items():
            yield name, self._listing.require(name, self._tensor(name, entry), self._where)

    def folder(self) -> Path:
        """See `Weights`; checked before it is named."""
        for _ in signed(self.tensors(), self._alive):
            pass
        return self._folder

    def _opened(self, head_crc32: int) -> tuple[dict[str, int], Listing]:
        """Where in the file each tensor begins, and what was sent."""
        length = self._read(0, 8)
        head = length + self._read(8, int.from_bytes(length, "little")) if len(length) == 8 else length
        if zlib.crc32(head) != head_crc32:
            raise SyncFailed(f"{self._where}: the file is another version's, or damaged: its header's checksum differs")
        header = json.loads(head[8:])
        listing = Listing.from_json(json.loads(header["__metadata__"]["burnish"]))
        if listing.digest != self.digest:
            raise SyncFailed(f"{self._where}: digest {listing.digest} is there, {self.digest} was announced")
        begins: dict[str, int] = {}
        for name, entry in listing.entries.items():
            begins[name] = len(head) + header[_name_in_file(name, self.adapter_only)]["data_offsets"][0]
            if begins[name] + entry.num_bytes > self._size:
                raise SyncFailed(f"{self._where}: the file is cut short: {name} lies behind its {self._size:,} bytes")
        return begins, listing

    def _tensor(self, name: str, entry: Entry) -> Tensor:
        if not entry.num_bytes:
            return torch.empty(entry.shape, dtype=entry.dtype)
        begin = self._begins[name]
        if self._map is not None:
            count = entry.num_bytes // entry.dtype.itemsize
            return torch.frombuffer(self._map, dtype=entry.dtype, count=count, offset=begin).reshape(entry.shape)
        data = self._read(begin, entry.num_bytes)
        if len(data) != entry.num_bytes:
            raise SyncFailed(f"{self._where}: the file was cut short while {name} was read")
        return torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape)

    def _read(self, begin: int, size: int) -> bytearray:
        """Fewer bytes where the file ends before."""
        data, filled = bytearray(min(size, max(0, self._size - begin))), 0
        try:
            with memoryview(data) as view:  # one read returns at most 2 GiB - 4 KiB on Linux
                while filled < len(view) and (count := os.preadv(self._file, [view[filled:]], begin + filled)):
                    filled += count
        except OSError as error:
            raise SyncFailed(f"{self._where}: {error.strerror}") from error
        del data[filled:]
        return data


class Written(NamedTuple):
    """A file of a version."""

    listing: Listing
    head_crc32: int
    """Of all bytes before the tensors': every byte of the file stands under exactly one checksum."""


def write_version(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    adapter_only: bool,
    durable: bool = False,
    header_bytes: int = HEADER_BYTES,
) -> Written:
    """One safetensors file of `tensors`, taken one after the other, in `folder`.

    Raises:
        OSError: the disk is full.
    """
    listing, entries, last = Listing(), {}, []
    with (folder / _file_name(adapter_only)).open("xb+", buffering=0) as file:
        end = 0

        def write(name: str, tensor: Tensor) -> None:
            nonlocal end
            listing.add(name, tensor)
            begin, end = end, end + tensor.nbytes
            facts = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
            entries[_name_in_file(name, adapter_only)] = facts
            _write(file, header_bytes + begin, tensor_bytes(tensor))

        for name, tensor in tensors:
            tensor = tensor.detach().contiguous().cpu()
            if tensor.nbytes % 8:  # behind the others, wide elements first: each is then aligned in the file
                last.append((name, tensor.clone()))
            else:
                write(name, tensor)
        for name, tensor in sorted(last, key=lambda each: -each[1].element_size()):
            write(name, tensor)
        said = json.dumps(listing.to_json(), separators=(",", ":"))
        header = json.dumps({"__metadata__": {"format": "pt", "burnish": said}, **entries}, separators=(",", ":"))
        head_crc32 = _write_header(file, header.encode(), header_bytes, end)
        if durable:
            os.fsync(file.fileno())
    if durable:
        _sync_folder(folder)
    return Written(listing, head_crc32)


def signed(tensors: Iterable[tuple[str, Tensor]], alive: Callable[[], None]) -> Iterator[tuple[str, Tensor]]:
    """`tensors`, each of them a sign of life."""
    for named in tensors:
        alive()
        yield named


def copy_base(folder: Path, to: Path) -> None:
    """Copies what stands beside a model's weights. Raises OSError."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(".safetensors.index.json"):
            shutil.copyfile(file, to / file.name)


def link_base(base: Path, folder: Path) -> None:
    """Lays the files of `base`, a folder beside `folder`, into it by relative links. Raises OSError."""
    for file in base.iterdir():
        (folder / file.name).symlink_to(Path("..") / base.name / file.name)


def _file_name(adapter_only: bool) -> str:
    return "adapter_model.safetensors" if adapter_only else "model.safetensors"


def _name_in_file(name: str, adapter_only: bool) -> str:
    return peft_name(name) if adapter_only else name


def _write_header(file: BinaryIO, header: bytes, room: int, end: int) -> int:
    """Puts the header before the `end` bytes of tensors, which begin at `room`; spaces fill it. Returns its crc32."""
    if 8 + len(header) > room:
        new_room = 8 + len(header) + -len(header) % 8
        for begin in range((end - 1) // MOVED_BYTES * MOVED_BYTES, -1, -MOVED_BYTES):
            file.seek(room + begin)
            _write(file, new_room + begin, memoryview(file.read(min(MOVED_BYTES, end - begin))))
        room = new_room
    head = (room - 8).to_bytes(8, "little") + header.ljust(room - 8)
    _write(file, 0, memoryview(head))
    return zlib.crc32(head)


def _write(file: BinaryIO, at: int, data: memoryview) -> None:
    file.seek(at)
    while len(data):
        data = data[file.write(data) :]


def _sync_folder(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _said(error: OSError, root: Path) -> str:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return str(error)
    free = shutil.disk_usage(root).free / 1e9
    return f"{error.strerror}: {free:.2f} GB are free in {root}, which holds two versions and takes a third"


def _cure(host: str) -> str:
    return (
        f"; they were written on {host}: for engines on other machines take `rollout.sync: {{type: broadcast}}`, or "
        "`{type: file, folder: ...}` with a folder that all of them see"
    )
