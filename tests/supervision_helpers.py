"""Ranks that do what a test asks of them, and what their supervisor reported."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from burnish.errors import DataError, Stopped
from burnish.launch.attempt import Limits
from burnish.launch.processes import LocalProcesses
from burnish.launch.signals import StopSignals
from burnish.launch.supervise import Supervisor

STEPS = 8
ASKED: list[int] = []
"""In a rank: signals that asked it to stop."""


class Recorded:
    """A report that a test reads."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.files: dict[str, str] = {}

    def event(self, kind: str, **facts: Any) -> None:
        self.events.append({"event": kind, "at": time.monotonic(), **facts})

    def note(self, text: str) -> None:
        self.notes.append(text)

    def stacks(self, rank: int, attempt: int, text: str) -> str:
        name = f"stacks-rank{rank}-{attempt}.txt"
        self.files[name] = text
        return name


def count(folder: Path, faults: Mapping[str, str], beat: Callable[[str], None]) -> int:
    """A rank that counts to `STEPS` in step with the others, and goes on where all of them were: as a run does.

    Args:
        faults: by `rank:step`, what happens there once.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    signal.signal(signal.SIGTERM, lambda number, _: ASKED.append(number))
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    beat("start")
    if rank == 0:
        lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as the run folder's: nothing of the last attempt holds it
    first = done(folder) + 1
    print(f"rank {rank} of {size} begins at {first}")
    for step in range(first, STEPS):
        beat(f"step {step}")
        suffer_once(folder, rank, step, faults)
        beat(f"wait {step}")
        at = [folder / f"at{other}-{os.environ['MASTER_PORT']}" for other in range(size)]
        at[rank].write_text(str(step))
        while any(_number(other) < step for other in at):
            time.sleep(0.005)
        if rank == 0:
            (folder / "done").write_text(str(step))
        if ASKED:
            raise Stopped(f"stopped after step {step}")
    return 0


def done(folder: Path) -> int:
    """Last step that all ranks have finished; -1: none."""
    return _number(folder / "done")


def _number(path: Path) -> int:
    try:
        return int(path.read_text() or -1)  # empty while it is written
    except FileNotFoundError:
        return -1


def suffer_once(folder: Path, rank: int, step: int, faults: Mapping[str, str]) -> None:
    """Brings the fault of this rank and step, if there is one, about this process; notes when."""
    fault, mark = faults.get(f"{rank}:{step}"), folder / f"fault-{rank}-{step}"
    if fault is None or mark.exists():
        return
    mark.write_text(str(time.monotonic()))
    if fault == "orphan" and os.fork() == 0:
        time.sleep(60)
    if fault == "gil":
        ctypes.PyDLL(None).sleep(60)
    if fault == "wait":
        while not ASKED:
            time.sleep(0.01)
        return
    if fault == "refuse":
        raise DataError("the row is not JSON", where="train.jsonl:7", cure="mend it")
    if fault == "bug":
        raise KeyError("no such column")
    os.kill(os.getpid(), getattr(signal, fault, signal.SIGKILL))


def supervise(folder: Path, faults: Mapping[str, str], heartbeat_seconds: float = 0.6) -> Recorded:
    """Two counting ranks to their end."""
    report = Recorded()
    backend = LocalProcesses(partial(count, folder, dict(faults)), 2)
    limits = Limits(5, heartbeat_seconds, start_seconds=20.0, grace_seconds=5.0)
    try:
        with StopSignals() as stop:
            progress = partial(done, folder)
            requested = stop.requested
            Supervisor(backend, [2], 2, limits, report, progress=progress, stop_requested=requested).run()
    finally:
        backend.close()
    return report


def main(folder: str, *faults: str) -> int:
    """The same as a command: `1:3=SIGKILL` is a fault. Returns its exit code."""
    try:
        supervise(Path(folder), dict(fault.split("=") for fault in faults), heartbeat_seconds=60.0)
    except Stopped as stopped:
        print(stopped)
        return stopped.exit_code
    return 0
