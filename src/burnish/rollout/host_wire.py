"""Frames over a socket: what a worker and whoever started it say to each other, without either waiting for the other.

A frame is eight bytes of length and as many bytes. `send` never blocks, so a worker that is stopped, or that is itself
about to say something long, cannot hold up the process that serves all of them.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Sequence

_LENGTH = 8


class Wire:
    """One end of a socket pair."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end
        self._out, self._in = bytearray(), bytearray()
        self.closed = False
        """Nothing more comes from the other end."""

    def fileno(self) -> int:
        return self._end.fileno()

    @property
    def unsent(self) -> int:
        """Bytes that the other end has not taken yet."""
        return len(self._out)

    def send(self, frame: bytes) -> None:
        """Queues a frame and sends as much as goes at once; the rest goes with later calls of `hear` or `flush`."""
        self._out += len(frame).to_bytes(_LENGTH, "little") + frame
        self._push()

    def hear(self) -> list[bytes]:
        """The frames that have come since the last call."""
        self._push()
        with contextlib.suppress(BlockingIOError):
            while not self.closed:
                try:
                    piece = self._end.recv(1 << 20)
                except ConnectionError:
                    piece = b""
                self._in += piece
                self.closed = not piece
        frames, start = [], 0
        while len(self._in) - start >= _LENGTH:
            size = int.from_bytes(self._in[start : start + _LENGTH], "little")
            if len(self._in) - start - _LENGTH < size:
                break
            frames.append(bytes(self._in[start + _LENGTH : start + _LENGTH + size]))
            start += _LENGTH + size
        del self._in[:start]
        return frames

    def flush(self) -> None:
        """Waits until the other end has taken everything, or has gone: for a worker, which ends with it."""
        while self._out and not self.closed:
            ready([], [self.fileno()], 1.0)
            self._push()

    def wait(self, seconds: float) -> list[bytes]:
        """Frames as soon as there are some, or the other end has gone; none after `seconds`."""
        until = time.monotonic() + seconds
        while True:
            frames = self.hear()
            left = until - time.monotonic()
            if frames or self.closed or left <= 0:
                return frames
            ready([self.fileno()], [self.fileno()] if self._out else [], min(left, 3600.0))

    def close(self) -> None:
        self._end.close()

    def _push(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._out and not self.closed:
                try:
                    sent = self._end.send(self._out)
                except ConnectionError:
                    self._out.clear()
                    return
                del self._out[:sent]


def ready(reads: Sequence[int], writes: Sequence[int], seconds: float) -> None:
    """Waits until one of these file descriptors can be read, or written, at most so long."""
    poller = select.poll()  # `select.select` knows no file descriptor above 1023
    for fd in {*reads, *writes}:
        poller.register(fd, (select.POLLIN if fd in reads else 0) | (select.POLLOUT if fd in writes else 0))
    poller.poll(seconds * 1000)
