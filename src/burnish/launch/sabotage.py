"""What can go wrong with a rank or a checkpoint, done on purpose to ranks of this machine.

Owns the faults that `burnish chaos` knows: which process gets which signal, and what is done to which file. Must not
know what is made of them afterwards.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

FAULTS = {
    "kill": "SIGKILL to one rank",
    "hang": "SIGSTOP to one rank, which then neither works nor ends",
    "term": "SIGTERM to the whole run, as before a preemption",
    "corrupt": "bits flipped, a page zeroed, the end cut off or a file missing in the newest checkpoint, then SIGKILL",
    "disk": "no file may grow from now on, until the next interval's save has failed; then SIGKILL",
}

DISK_FULL_BYTES = 4096
"""No file of a rank grows beyond this on a full disk: the write fails with EFBIG."""


class Fault(NamedTuple):
    """One thing that goes wrong: `kill` of rank 1, 0.02 s after it began step 7."""

    kind: str
    step: int
    delay: float
    rank: int


def plan(
    kinds: Sequence[str], trial: int, *, steps: int, save_every: int, ranks: int, seed: int, count: int = 2
) -> list[Fault]:
    """The `count` faults of a trial, at random places of a run of `steps`. Trials take the kinds in turn."""
    rng = random.Random(f"{seed}:{trial}")
    faults = []
    for kind in (kinds[trial % len(kinds)], *rng.choices(kinds, k=count - 1)):
        # Two checkpoints must be there, or there is nothing to fall back to.
        earliest = min(2 * save_every + 1, steps) if kind == "corrupt" else 1
        faults.append(Fault(kind, rng.randint(earliest, steps), rng.uniform(0.0, 0.02), rng.randrange(ranks)))
    return sorted(faults, key=lambda fault: fault.step)


class Injected(NamedTuple):
    """A fault that was carried out."""

    fault: Fault
    finished: int
    """Steps that were done then."""
    starts: int
    """Of the run until then: events `begun` and `resumed`."""
    at: float
    """By `time.monotonic`."""
    what: str


class Saboteur:
    """Carries out one trial's faults, one after the other, each when its rank has come to its step.

    Args:
        save_every: steps between the run's checkpoints.
    """

    def __init__(self, faults: Sequence[Fault], run_dir: Path, save_every: int, seed: int) -> None:
        self._left, self._run_dir, self._save_every = list(faults), run_dir, save_every
        self._rng = random.Random(seed)
        self._since: float | None = None
        self._full_from: int | None = None
        self.injected: list[Injected] = []
        self.stop_requested: str | None = None
        """The signal that the whole run has got; whoever starts the run again takes it away."""

    def look(self, pids: Mapping[int, int], phases: Sequence[str]) -> None:
        """To be called every few milliseconds with the running ranks and what they are about."""
        if not self._left or self.stop_requested is not None:
            return
        fault = self._left[0]._replace(rank=self._left[0].rank % len(phases))
        found = re.match(r"step (\d+)", phases[fault.rank])
        step = int(found[1]) if found else 0
        if fault.rank not in pids or step < fault.step:
            return
        self._since = self._since or time.monotonic()
        if time.monotonic() - self._since >= fault.delay and (what := self._do(fault, pids, step)) is not None:
            self.injected.append(Injected(fault, step - 1, len(starts(self._run_dir)), time.monotonic(), what))
            self._left.pop(0)
            self._since = self._full_from = None

    def _do(self, fault: Fault, pids: Mapping[int, int], step: int) -> str | None:
        """What was done; None: not yet."""
        pid = pids[fault.rank]
        if fault.kind == "term":
            self.stop_requested = "SIGTERM"
            return "SIGTERM to all ranks"
        if fault.kind == "hang":
            os.kill(pid, signal.SIGSTOP)
            return f"SIGSTOP to rank {fault.rank}"
        what = f"SIGKILL to rank {fault.rank}"
        if fault.kind == "corrupt":
            damage = self._damage()
            if damage is None:
                return None
            what = f"{damage}, {what}"
        if fault.kind == "disk":
            if self._full_from is None:
                for each in pids.values():
                    _, hard = resource.prlimit(each, resource.RLIMIT_FSIZE)
                    resource.prlimit(each, resource.RLIMIT_FSIZE, (DISK_FULL_BYTES, hard))
                self._full_from = step
            if step < self._full_from + self._save_every:
                return None
            what = f"disk full from step {self._full_from} on, {what}"
        os.kill(pid, signal.SIGKILL)
        return what

    def _damage(self) -> str | None:
        """Damages the newest of at least two checkpoints; None: there are not two."""
        found = sorted(self._run_dir.glob("checkpoint-*/manifest.json"), key=lambda path: _step(path.parent))
        if len(found) < 2:
            return None
        folder = found[-1].parent
        try:
            path = self._rng.choice(sorted(path for path in folder.iterdir() if path.stat().st_size))
            return f"{folder.name}/{path.name}: {damage(path, self._rng)}"
        except FileNotFoundError:  # a newer one has just replaced it
            return None


def starts(run_dir: Path) -> list[int]:
    """The step that each start of a run went on from; 0: from the beginning."""
    path = run_dir / "events.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    events = [json.loads(line) for line in lines if line.endswith(b"}")]
    return [event["step"] for event in events if event["event"] in ("begun", "resumed")]


def damage(path: Path, rng: random.Random) -> str:
    """Makes a file wrong in one of four ways; says how."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    how = rng.choice(("flip", "zero", "cut", "remove"))
    if how == "remove":
        path.unlink()
        return "removed"
    if how == "flip":
        content[place] ^= 1 << rng.randrange(8)
    elif how == "zero":
        page = slice(place // 4096 * 4096, min(place // 4096 * 4096 + 4096, len(content)))
        if not any(content[page]):
            content[place] = 1
        else:
            content[page] = bytes(page.stop - page.start)
    else:
        del content[place:]
    path.write_bytes(content)
    return {"flip": f"bit of byte {place} flipped", "zero": f"page at {place // 4096 * 4096} zeroed"}.get(
        how, f"cut off at byte {place}"
    )


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))
