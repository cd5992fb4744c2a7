"""A rollout worker's process as whoever started it sees it: frames both ways, the lines that it prints, how it ends.

A fresh interpreter, because the process that starts it runs torch, whose threads do not survive a fork. It is the
leader of a session of its own: Ctrl-C at a terminal is for the trainer, and all that it starts can be killed with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from burnish.child import GONE_SECONDS, OF_RANKS, end_family, how_it_ended
from burnish.rollout.host_wire import Wire, ready

LONGEST_LINE = 1 << 16
"""Bytes without an end that are passed on as a line: a progress bar may have none for long."""

START_SECONDS = 30.0
"""Of starting a process, before it runs a line of ours: milliseconds, unless the machine swaps."""


class Heard(NamedTuple):
    """What came from a worker since it was listened to last."""

    frames: list[bytes]
    lines: list[str]
    """That it printed."""
    ended: str | None
    """How it ended, if it has; nothing comes after that."""


class ProcessLink:
    """One process. `hear` and `send` never wait; each may be called from a thread of its own."""

    def __init__(self, process: subprocess.Popen[bytes], end: socket.socket, printed: int) -> None:
        self.pid: int | None = process.pid
        self.place = f"process {process.pid}"
        self._process, self._wire, self._printed = process, Wire(end), printed
        self._line = bytearray()
        self._is_open = True
        """The pipe of what it prints."""
        self._lock = threading.Lock()
        os.set_blocking(printed, False)

    def send(self, frame: bytes) -> None:
        """Queues a frame."""
        with self._lock:
            self._wire.send(frame)

    def hear(self) -> Heard:
        """What has come."""
        with self._lock:
            code = self._process.poll()  # before it is listened to: what an ended process said is all there
            frames = self._wire.hear()
            lines = self._lines(last=code is not None)
            return Heard(frames, lines, None if code is None else how_it_ended(code))

    def readable(self) -> list[int]:
        """File descriptors that say when something came."""
        return ([] if self._wire.closed else [self._wire.fileno()]) + ([self._printed] if self._is_open else [])

    def writable(self) -> list[int]:
        """The same for what could not be sent at once."""
        return [self._wire.fileno()] if self._wire.unsent and not self._wire.closed else []

    def ask(self) -> None:
        """Has it print where it stands, if it can."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        """Ends it and what it started, but for what had lost its parent before; see `child.end_family`."""
        with self._lock:
            end_family(self._process.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GONE_SECONDS)
            self._wire.close()
            if self._is_open:
                os.close(self._printed)
            self._is_open, self._wire.closed = False, True

    def _lines(self, *, last: bool) -> list[str]:
        if not self._is_open:
            return []
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._printed, LONGEST_LINE):
                self._line += piece
            os.close(self._printed)
            self._is_open = False
        *whole, rest = bytes(self._line).split(b"\n")
        if rest and (last or len(rest) >= LONGEST_LINE):
            whole.append(rest)
            rest = b""
        self._line[:] = rest
        return [line.decode(errors="replace") for line in whole]


class ProcessStarter:
    """Starts workers on this machine.

    Args:
        environment: of them, beside this process's.
        without: names of this process's environment that are not for them.
        gpus: of each worker, by its index; None: it sees what this process sees.
        cpus: that they may run on; None: all.
    """

    def __init__(
        self,
        environment: dict[str, str],
        *,
        without: Sequence[str] = (),
        gpus: Sequence[Sequence[int]] | None = None,
        cpus: Sequence[int] | None = None,
    ) -> None:
        hidden = {*without, *OF_RANKS}
        self._environment = {name: value for name, value in os.environ.items() if name not in hidden} | environment
        self._gpus, self._cpus = gpus, None if cpus is None else list(cpus)
        # The kernel ends a worker with the thread that started it: this one lives as long as the run, while those that
        # ask for workers come and go.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout-starter")

    def start(self, index: int, order: bytes) -> ProcessLink:
        """Starts worker `index` with its first frame. Raises OSError."""
        try:
            link = self._thread.submit(self._start, index).result(START_SECONDS)
        except TimeoutError as error:
            raise OSError(f"its process could not be started in {START_SECONDS:.0f} s") from error
        link.send(order)
        return link

    def wait(self, links: Sequence[ProcessLink], seconds: float) -> None:
        """Returns when something came from one of them, or after `seconds`."""
        listen(links, seconds)

    def close(self) -> None:
        """All workers have ended."""
        self._thread.shutdown()

    def _start(self, index: int) -> ProcessLink:
        ours, theirs = socket.socketpair()
        printed, prints = os.pipe()
        environment = dict(self._environment)
        if self._gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self._gpus[index]))
        arguments = (theirs.fileno(), os.getpid(), self._cpus)
        code = f"import sys; sys.path[:] = {sys.path}; import burnish.rollout.host as h; h.main{arguments}"
        # With this process's path, and not what lies in the current folder before it (-P), where a random.py may lie.
        command = [sys.executable, "-P", "-u", "-c", code]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=prints,
                stderr=prints,
                env=environment,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        except OSError:
            ours.close()
            os.close(printed)
            raise
        finally:
            theirs.close()
            os.close(prints)
        return ProcessLink(process, ours, printed)


def listen(links: Sequence[ProcessLink], seconds: float) -> None:
    """Waits until something came from one of `links`, at most so long."""
    reads = [each for link in links for each in link.readable()]
    writes = [each for link in links for each in link.writable()]
    if reads or writes:
        ready(reads, writes, seconds)
    else:
        time.sleep(seconds)
