"""The process that ranks are forked from: it has imported everything and computed nothing, so restarts are quick.

It forks a rank when it is told to, passes signals on, reads what ranks print and how they end, and says so to the
supervisor over one pipe. Nothing outlives what it belongs to: on Linux the kernel ends ranks with the nursery and the
nursery with the supervisor, however those end; multiprocessing's fork server cannot promise it, because its children
hold the pipe by which it would learn that its parent is gone. Must run no torch operator: the threads of OpenMP do not
survive a fork, and the ranks would hang. Must not know what ranks do.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import pickle
import selectors
import signal
import socket
import sys
from multiprocessing.connection import Connection
from typing import NamedTuple, NoReturn

from burnish.child import die_with_parent, end_family
from burnish.launch.heartbeat import BeatBoard
from burnish.launch.worker_group import Ended, Outcome, outcome_of

LONGEST_LINE = 1 << 16
"""Bytes without an end that are printed as a line."""


class Birth(NamedTuple):
    """Asks for a rank."""

    rank: int
    environment: dict[str, str]
    work: bytes
    """Pickled function of the rank's beat."""


class Kill(NamedTuple):
    """Asks for a signal to ranks; SIGKILL also ends what they started."""

    ranks: list[int]
    number: int


class Born(NamedTuple):
    """A rank runs."""

    rank: int
    pid: int


class Trace(NamedTuple):
    """A part of a rank's Python stacks."""

    rank: int
    text: str


News = Born | Trace | Ended


class _Child:
    """A rank as its parent sees it."""

    def __init__(self, rank: int, pid: int, pipes: dict[str, int]) -> None:
        self.rank, self.pid, self.pipes = rank, pid, pipes
        self.read = {name: bytearray() for name in pipes}

    def outcome(self, code: int) -> Outcome:
        """From what it left behind: its own words, or the stacks of a crash."""
        with contextlib.suppress(ValueError, TypeError):  # it died before, or while, it wrote them
            return Outcome(**json.loads(self.read["outcome"]))
        crash = self.read["trace"].decode(errors="replace")
        fatal = crash.rfind("Fatal Python error")
        return Outcome(code, crash[fatal:] if fatal >= 0 else "")


class Nursery:
    """Serves one supervisor until that is gone."""

    def __init__(self, connection: Connection, board: BeatBoard) -> None:
        self._connection, self._board = connection, board
        self._children: dict[int, _Child] = {}
        self._selector = selectors.DefaultSelector()
        self._wake, wakes = socket.socketpair()
        self._wake.setblocking(False)
        wakes.setblocking(False)
        self._wakes = wakes
        signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler nothing is written to the wake-up socket
        signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
        self._selector.register(connection, selectors.EVENT_READ, self._obey)
        self._selector.register(self._wake, selectors.EVENT_READ, self._reap)

    def serve(self) -> None:
        """Returns when the supervisor has closed the connection, with no rank left."""
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                for key, _ in self._selector.select():
                    key.data()
        self._kill(Kill([child.rank for child in self._children.values()], signal.SIGKILL))

    def _obey(self) -> None:
        order = self._connection.recv()
        if isinstance(order, Birth):
            self._fork(order)
        else:
            self._kill(order)

    def _kill(self, order: Kill) -> None:
        for child in self._children.values():  # none of them is reaped, so no pid is another process's by now
            if child.rank in order.ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, order.number)
                if order.number == signal.SIGKILL:
                    end_family(child.pid)

    def _fork(self, order: Birth) -> None:
        names = ["trace", "outcome", *(["output"] if order.rank > 0 else [])]
        pipes = {name: os.pipe() for name in names}
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            for reader, _ in pipes.values():
                os.close(reader)
            self._forget()
            _live(order, parent, self._board, {name: writer for name, (_, writer) in pipes.items()})
        child = _Child(order.rank, pid, {})
        for name, (reader, writer) in pipes.items():
            os.close(writer)
            os.set_blocking(reader, False)
            child.pipes[name], child.read[name] = reader, bytearray()
            self._selector.register(reader, selectors.EVENT_READ, lambda name=name: self._drain(child, name))
        self._children[pid] = child
        self._connection.send(Born(order.rank, pid))

    def _forget(self) -> None:
        """In a rank: closes what is its parent's."""
        signal.set_wakeup_fd(-1)
        for child in self._children.values():
            for reader in child.pipes.values():
                os.close(reader)
        self._selector.close()
        for each in (self._wake, self._wakes, self._connection):
            each.close()

    def _drain(self, child: _Child, name: str) -> None:
        """Reads all that a pipe holds; closes it at its end."""
        if name not in child.pipes:  # the rank was reaped since the selector saw this pipe
            return
        reader, read = child.pipes[name], child.read[name]
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(reader, 65536):
                read += piece
                if name == "trace":
                    self._connection.send(Trace(child.rank, piece.decode(errors="replace")))
                if name == "output":
                    _print_lines(child.rank, read)
            self._close(child, name)

    def _close(self, child: _Child, name: str) -> None:
        reader = child.pipes.pop(name)
        self._selector.unregister(reader)
        os.close(reader)
        if name == "output" and child.read[name]:
            child.read[name] += b"\n"
            _print_lines(child.rank, child.read[name])

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake.recv(4096):
                pass
        for child in list(self._children.values()):
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid == 0:
                continue
            end_family(pid)  # what a dead rank has forked would still hold its run folder
            for name in list(child.pipes):
                self._drain(child, name)
                if name in child.pipes:
                    self._close(child, name)
            del self._children[pid]
            self._connection.send(Ended(child.rank, child.outcome(os.waitstatus_to_exitcode(status))))


def _print_lines(rank: int, read: bytearray) -> None:
    """Prints and takes away whole lines, each with its rank before it; a progress bar may have no end for long."""
    *lines, rest = bytes(read).split(b"\n")
    if len(rest) >= LONGEST_LINE:
        lines, rest = [*lines, rest], b""
    read[:] = rest
    text = b"".join(b"[%d] %s\n" % (rank, line) for line in lines)
    with contextlib.suppress(OSError):  # a closed terminal: nobody reads it, and a run does not end for it
        while text:
            text = text[os.write(2, text) :]


def _live(order: Birth, parent: int, board: BeatBoard, pipes: dict[str, int]) -> NoReturn:
    """The rest of a rank's life, in the process that was forked for it."""

    def life() -> int:
        os.setsid()  # Ctrl-C is for the supervisor, which asks all ranks to stop
        die_with_parent(parent)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if "output" in pipes:
            for number, stream in ((1, sys.stdout), (2, sys.stderr)):
                os.dup2(pipes["output"], number)
                stream.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
        faulthandler.enable(pipes["trace"])
        faulthandler.register(signal.SIGUSR1, pipes["trace"], all_threads=True)
        os.environ.update(order.environment)
        return pickle.loads(order.work)(board.writer(order.rank))

    code = 1
    try:
        outcome = outcome_of(life)
        code = outcome.code
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        with os.fdopen(pipes["outcome"], "w") as file:
            json.dump(outcome._asdict(), file)
    finally:
        os._exit(code & 255)  # no exit handlers: they are the nursery's


def main(connection: int, board: int, modules: list[str]) -> None:
    """Imports `modules`, then serves.

    Args:
        connection: file descriptor of the pipe to the supervisor.
        board: that of the board for beats.
    """
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal or a cluster sends them to every process
        signal.signal(number, signal.SIG_IGN)
    for module in modules:
        importlib.import_module(module)
    Nursery(Connection(connection), BeatBoard(board)).serve()
