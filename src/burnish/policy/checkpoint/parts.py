"""A file as parts in an object store: `model.safetensors/00000`, `model.safetensors/00001`, ...

A part is an object of at most 32 MiB, which is there whole or not at all and is sent again by itself. It is an object
of its own, not a piece of a multipart upload: those of a dead process are paid for, unseen, until somebody aborts them.
Must not know what is in a file.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from burnish.policy.checkpoint.objects import Objects

PART_BYTES = 32 * 2**20
AT_ONCE = 4
"""Requests in flight for one file: at most 4 x 32 MiB of small tensors are joined in memory."""
AHEAD_BYTES = 4 * 2**20
"""Least that is fetched: a model's hundreds of small tensors lie side by side, and a request takes some 20 ms."""


def send(objects: Objects, path: str, chunks: Iterable[bytes | memoryview], part_bytes: int = PART_BYTES) -> None:
    """Stores the chunks as the parts of the file `path`, durable on return. They are taken one after the other in this
    thread while others send what came before. Raises OSError: some parts are there."""
    sending: deque[Future[None]] = deque()
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="send") as pool:
        try:
            for number, part in enumerate(_cut(chunks, part_bytes)):
                if len(sending) == AT_ONCE:
                    sending.popleft().result()
                sending.append(pool.submit(objects.put, _part(path, number), part))
            while sending:
                sending.popleft().result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class StoredFiles:
    """The files below one folder of a store, as it was when this was made; nothing in it changes."""

    def __init__(self, objects: Objects, folder: str) -> None:
        """Raises OSError."""
        self._objects, self.folder = objects, folder
        self._parts: dict[str, dict[str, int]] = {}
        for name, size in objects.tree(f"{folder}/").items():
            file, _, number = name.rpartition("/")
            self._parts.setdefault(file, {})[number] = size
        self._ahead: tuple[str, int, memoryview] = "", 0, memoryview(b"")

    def sizes(self) -> dict[str, int]:
        """File -> bytes, of all files whose parts are all there but perhaps the last ones."""
        return {file: sum(parts.values()) for file, parts in self._parts.items() if not _gap(parts)}

    def size(self, file: str) -> int:
        """Bytes of a file. Raises OSError."""
        return sum(self._sizes_of(file))

    def read(self, file: str, offset: int = 0, size: int | None = None) -> bytearray:
        """`size` bytes from `offset` (absent: all of the rest), fewer where the file ends before. Raises OSError."""
        parts = self._sizes_of(file)
        end = sum(parts) if size is None else min(offset + size, sum(parts))
        data = bytearray(max(0, end - offset))
        wanted = list(_ranges(parts, offset, end))
        if len(wanted) == 1 and len(data) < AHEAD_BYTES:
            data[:] = self._from_ahead(_part(f"{self.folder}/{file}", wanted[0].number), wanted[0])
            return data

        def fetch(piece: _Range) -> None:
            found = self._fetch(_part(f"{self.folder}/{file}", piece.number), piece.begin, piece.length)
            view[piece.to : piece.to + piece.length] = found

        with memoryview(data) as view, ThreadPoolExecutor(AT_ONCE, thread_name_prefix="fetch") as pool:
            for future in [pool.submit(fetch, piece) for piece in wanted]:
                future.result()
        return data

    def _sizes_of(self, file: str) -> list[int]:
        parts = self._parts.get(file, {})
        if not parts or _gap(parts):
            missing = next(number for number in _numbers(parts) if number not in parts)
            raise FileNotFoundError(errno.ENOENT, f"part {missing} is missing", f"{self.folder}/{file}")
        return [parts[number] for number in sorted(parts)]

    def _from_ahead(self, name: str, piece: _Range) -> memoryview:
        held_name, begin, held = self._ahead
        if name != held_name or not begin <= piece.begin <= piece.begin + piece.length <= begin + len(held):
            begin = piece.begin
            held = self._fetch(name, begin, min(AHEAD_BYTES, piece.left))
            self._ahead = name, begin, held
        return held[piece.begin - begin : piece.begin - begin + piece.length]

    def _fetch(self, name: str, begin: int, length: int) -> memoryview:
        found = memoryview(self._objects.read(name, begin, length))
        if len(found) != length:
            raise OSError(errno.EIO, f"{len(found)} bytes came, {length} were asked for", f"{self._objects.url}/{name}")
        return found


class _Range(NamedTuple):
    """Bytes of one part that are wanted."""

    number: int
    begin: int
    length: int
    to: int
    """Where they go in what was asked for."""
    left: int
    """Bytes of the part from `begin` on."""


def _ranges(parts: list[int], offset: int, end: int) -> Iterator[_Range]:
    """Bytes 5 to 8 of a file with parts of 6, 6 and 1 bytes: the last of the first part, two of the second."""
    start = 0
    for number, size in enumerate(parts):
        begin, stop = max(offset, start), min(end, start + size)
        if begin < stop:
            yield _Range(number, begin - start, stop - begin, begin - offset, start + size - begin)
        start += size


def _cut(chunks: Iterable[bytes | memoryview], part_bytes: int) -> Iterator[bytes | memoryview]:
    """The same bytes in pieces of `part_bytes`, the last one shorter; nothing is copied within a chunk. An empty file
    is one empty piece."""
    held: list[memoryview] = []
    room, empty = part_bytes, True
    for chunk in chunks:
        rest = memoryview(chunk)
        while len(rest):
            held.append(rest[:room])
            rest, room = rest[room:], room - len(held[-1])
            if room == 0:
                yield held[0] if len(held) == 1 else b"".join(held)
                held, room, empty = [], part_bytes, False
    if held or empty:
        yield b"".join(held)


def _part(path: str, number: int) -> str:
    return f"{path}/{number:05d}"


def _numbers(parts: Iterable[str]) -> list[str]:
    """The names that the parts of a file must have, and the one after."""
    return [f"{number:05d}" for number in range(len(list(parts)) + 1)]


def _gap(parts: dict[str, int]) -> bool:
    return sorted(parts) != _numbers(parts)[:-1]
