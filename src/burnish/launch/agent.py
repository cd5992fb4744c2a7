"""What stands on a cluster's node for one rank: starts it, listens to it, passes signals on.

The rank is a process of its own, forked from a nursery. So it has its own main thread for signals, a crash of it leaves
somebody who can tell, a hung one can be asked where it stands, and a restart imports nothing. The agent never runs what
a rank runs, so it always answers. Must not know what carries its calls.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

from burnish.child import family
from burnish.launch.heartbeat import BeatBoard
from burnish.launch.nursery import Birth
from burnish.launch.processes import NurseryProcess, ProcessGroup
from burnish.launch.worker_group import Beat, Outcome, Stack
from burnish.ray_cluster import SECRETS

OUT, ERR = 1, 2

LONGEST_LINE = 1 << 16
"""Bytes without a line's end that are passed on as a line."""

INTERFACE = "GLOO_SOCKET_IFNAME"


class Told(NamedTuple):
    """What an agent has to say since it was asked last."""

    lines: list[tuple[int, str]]
    """What the rank printed: 1 or 2 for standard output or error, and a line."""
    beat: Beat
    outcome: Outcome | None
    """How the rank ended, if it did since then."""


class Agent:
    """Must be made, and used, in one thread that lives as long as the process: the kernel ends the rank with it.

    Args:
        modules: what every rank imports, once.
        folder: current folder of the rank, where this machine has it.
        path: of modules, as where the run was started; what of it this machine has comes last.
        without: names of this process's environment that are not for the rank.
    """

    def __init__(
        self, modules: Sequence[str], folder: str, path: Sequence[str], *, without: Sequence[str] = SECRETS
    ) -> None:
        # A cluster that goes down sends SIGTERM to every process; the rank writes a checkpoint then, and needs this.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.has_folder = os.path.isdir(folder)
        if self.has_folder:
            os.chdir(folder)
        sys.path += [each for each in path if each not in sys.path and os.path.isabs(each) and os.path.isdir(each)]
        self._modules = list(modules)
        self._environment = {name: value for name, value in os.environ.items() if name not in without}
        self._board = BeatBoard.create(1)
        self._read: dict[int, tuple[int, bytearray]] = {}
        self._writers: list[int] = []
        for stream in (OUT, ERR):
            reader, writer = os.pipe()
            os.set_blocking(reader, False)
            self._read[reader] = stream, bytearray()
            self._writers.append(writer)
        self._nursery = self._open_nursery()
        self._group: ProcessGroup | None = None

    def start(self, environment: Mapping[str, str], work: bytes) -> None:
        """Begins the rank that `environment` describes; `work` is its pickled function of the beat."""
        if not self._nursery.alive():
            self._nursery.end()
            self._nursery = self._open_nursery()
        self._board.clear()
        # Which interface machines of this network use, whoever runs them may have said already.
        given = {name: value for name, value in environment.items() if name != INTERFACE or name not in os.environ}
        self._nursery.connection.send(Birth(0, given, work))
        self._group = ProcessGroup(self._nursery, self._board, 1)

    def poll(self, seconds: float) -> Told:
        """Returns as soon as the rank has ended or printed something, else after `seconds`."""
        group, until = self._running(), time.monotonic() + seconds
        outcome, lines = None, []
        while outcome is None and not lines:
            left = until - time.monotonic()
            if left <= 0:
                break
            wait([self._nursery.connection, *self._read], left)
            ended = group.wait(0.0)
            outcome = ended[0].outcome if ended else None
            lines = self._lines(last=outcome is not None)
        return Told(lines, group.beats()[0], outcome)

    def pid(self) -> int | None:
        """The rank's process, once it was forked."""
        return self._running().pids.get(0)

    def stop(self) -> None:
        """Sends SIGTERM to the rank."""
        self._running().stop()

    def stacks(self) -> Stack:
        """Where the rank stands; takes two seconds at most."""
        return self._running().stacks([0])[0]

    def kill(self) -> Told:
        """Ends the rank and what it started; what it printed is all there."""
        group = self._running()
        group.kill()
        return Told(self._lines(last=True), group.beats()[0], None)

    def _running(self) -> ProcessGroup:
        assert self._group is not None, "no rank was started"
        return self._group

    def _open_nursery(self) -> NurseryProcess:
        out, err = self._writers
        return NurseryProcess(self._board, self._modules, self._environment, (out, err))

    def _lines(self, *, last: bool) -> list[tuple[int, str]]:
        """Whole lines that were printed; with `last`, also what has no end."""
        lines = []
        for reader, (stream, read) in self._read.items():
            with contextlib.suppress(BlockingIOError):
                while piece := os.read(reader, LONGEST_LINE):
                    read += piece
            *whole, rest = bytes(read).split(b"\n")
            if rest and (last or len(rest) >= LONGEST_LINE):
                whole.append(rest)
                rest = b""
            read[:] = rest
            lines += [(stream, line.decode(errors="replace")) for line in whole]
        return lines


def free_port(address: str) -> int:
    """A TCP port of this machine's interface `address` that nobody listens at."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def interface_of(address: str) -> str | None:
    """Name of the network interface that has this IPv4 address; None where it is not known."""
    if sys.platform != "linux":
        return None
    import fcntl

    get_interface_address = 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = name.encode()[:15].ljust(40, b"\0")
            with contextlib.suppress(OSError):  # an interface without an IPv4 address
                if socket.inet_ntoa(fcntl.ioctl(probe, get_interface_address, request)[20:24]) == address:
                    return name
    return None


def end_agent(pid: int, name: str) -> None:
    """Kills an agent of this machine; returns when it and all it started are gone. Raises TimeoutError after 5 s."""
    members, until = family(pid) if _is(pid, name) else [], time.monotonic() + 5.0
    while any(_runs(member) for member in members):
        if time.monotonic() >= until:
            raise TimeoutError(f"process {pid} was killed, and something of it still runs")
        if _runs(pid):
            os.kill(pid, signal.SIGKILL)  # its nursery and its rank end with it
        time.sleep(0.02)


def _is(pid: int, name: str) -> bool:
    """Whether a process of this number is still the one called so; not where there is no /proc."""
    with contextlib.suppress(OSError):
        return name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _runs(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


class Place(NamedTuple):
    """Where an agent stands."""

    node: str
    """The same for all agents of a machine."""
    address: str
    """The machine's IP address in the cluster."""
    gpus: tuple[str, ...]
    """Indices of the agent's GPUs on its machine."""
    pid: int
    interface: str | None
    has_folder: bool
    """Whether the machine has the folder that the run was started in."""
    guarded: bool
    """Whether the cluster asks for a token."""


def in_order(places: Sequence[Place], first: str) -> list[int]:
    """The agents by rank: those of node `first` before all others, then node by node and GPU by GPU.

    So the innermost axes of a mesh, whose ranks say the most to each other, lie within a node.
    """

    def key(index: int) -> tuple[bool, str, str, tuple[int, ...]]:
        place = places[index]
        return place.node != first, place.address, place.node, tuple(int(g) for g in place.gpus if g.isdecimal())

    return sorted(range(len(places)), key=key)


def environments(places: Sequence[Place], port: int) -> list[dict[str, str]]:
    """What each rank's process must have in its environment; `places` by rank, `port` free on that of rank 0.

    A rank sees all GPUs of the run on its node, and takes the one that LOCAL_RANK says, as under torchrun. Ranks of one
    node alone find each other over the loopback interface.
    """
    together = len({place.node for place in places}) == 1
    found = []
    for rank, place in enumerate(places):
        peers = [other for other, at in enumerate(places) if at.node == place.node]
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(places)),
            "LOCAL_RANK": str(peers.index(rank)),
            "LOCAL_WORLD_SIZE": str(len(peers)),
            "MASTER_ADDR": "127.0.0.1" if together else places[0].address,
            "MASTER_PORT": str(port),
        }
        if place.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpu for peer in peers for gpu in places[peer].gpus)
        interface = "lo" if together and place.interface is not None else place.interface
        if interface is not None:
            environment[INTERFACE] = interface
        found.append(environment)
    return found
