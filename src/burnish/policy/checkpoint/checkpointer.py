"""Asynchronous saving by all ranks together: a step waits for a copy in memory, background threads do the rest.

Owns the one save in flight and what is kept. Each rank's thread writes that rank's files; once all are durable, rank 0
commits. Threads never speak with other ranks: the main threads do, in `poll`, at the same point of every step. Must not
know the format, nor where checkpoints lie.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.errors import RunFailed
from burnish.policy.checkpoint import reader
from burnish.policy.checkpoint.index import Index, encode, merge, pack, unpack
from burnish.policy.checkpoint.manifest import Corrupt
from burnish.policy.checkpoint.outcome import Saved, SaveFailed
from burnish.policy.checkpoint.piece import Piece
from burnish.policy.checkpoint.place import Draft, LocalPlace, Place
from burnish.policy.checkpoint.reader import LoadedCheckpoint, Wanted
from burnish.policy.checkpoint.staging import Staging, is_written
from burnish.policy.checkpoint.storage import Storage
from burnish.policy.checkpoint.together import Alone, Ranks, raise_told, together, told
from burnish.policy.checkpoint.writer import write_part

DEADLINE_SECONDS = 1800.0
"""Longest wait for a disk: a network file system that hangs must not hang the run for ever."""


@dataclass(slots=True)
class _Flight:
    """The save in flight, as one rank sees it."""

    step: int
    draft: Draft
    num_bytes: int
    """Of all ranks."""
    again: bool
    """This very checkpoint is there, and was proved or written by this process."""
    begun: float
    staged: Future[dict[str, dict[str, Piece]]]
    part: Future[dict[str, Any]]
    """This rank's files: JSON."""
    ending: bool = False
    """All parts are durable, or one has failed: it is rank 0's turn."""
    end: Future[dict[str, Any]] | None = None
    """On rank 0: the outcome, JSON."""


class Checkpointer:
    """Saves and loads the checkpoints of one run, whose owner its rank 0 is.

    Every rank calls every method at the same step. A rank's error is every rank's error.

    >>> checkpointer = Checkpointer(run_dir, keep=2, mesh=mesh)
    >>> checkpointer.save(10, {"model": {"lm_head.weight": Piece(rows, region)}}, {"data": {"cursor": 80}})
    >>> checkpointer.poll()         # at a later step
    [Saved(step=10, ...)]
    """

    def __init__(
        self,
        place: Place | Path,
        *,
        keep: int,
        mesh: Ranks | None = None,
        storage: Storage | None = None,
        staging: Staging | None = None,
        deadline_seconds: float = DEADLINE_SECONDS,
    ) -> None:
        assert keep >= 1, "a run without a checkpoint cannot be resumed"
        self.place: Place = LocalPlace(place, storage) if isinstance(place, Path) else place
        self._keep, self._deadline_seconds = keep, deadline_seconds
        self._ranks: Ranks = mesh or Alone()
        self._staging = staging or Staging()
        self._overlapped = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._flight: _Flight | None = None
        self._finished: list[Saved | SaveFailed] = []
        self._proved: int | None = None
        """The step whose checkpoint was read or written last, by this process."""
        self._superseded: set[int] = set()
        """Later than the one that the run goes on from: they are corrupt, or were gone back behind."""

    def overlap(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on even the copy runs in the background, beside the next forward pass: `save` returns at once, and
        `optimizer.step`, which alone may change saved tensors, waits until the copy is made."""
        self._overlapped = True
        optimizer.register_step_pre_hook(lambda *_: self.wait_staged())

    def save(
        self,
        step: int,
        pieces: Mapping[str, Mapping[str, Piece | Tensor]],
        state: dict[str, Any],
        *,
        wait: bool = False,
    ) -> None:
        """Copies the tensors and returns; they may change at once. A save still in flight is waited for first.

        Args:
            step: finished steps.
            pieces: group (a file) -> Hugging Face name -> what this rank holds of it, of any device, layout, shape and
                dtype; a plain tensor is whole and this rank's to write. All ranks name the same groups.
            state: JSON: what is no tensor. Rank 0's is saved.
            wait: return when the checkpoint is durable, or has failed: `poll` says which.
        """
        self.wait()
        given = {group: {name: _piece(value) for name, value in members.items()} for group, members in pieces.items()}
        encoded = json.dumps(state).encode() if self._ranks.rank == 0 else b""
        num_bytes = len(encoded) + sum(
            piece.tensor.nbytes for members in given.values() for piece in members.values() if is_written(piece)
        )
        plan: dict[str, Any] = {"token": secrets.token_hex(4), "bytes": num_bytes, "again": self._is_there(step)}
        plans = self._ranks.gather(plan)
        ready = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if ready is not None:
            ready.record()
        staged = self._thread.submit(self._staging.copy, given, ready)
        flight = _Flight(
            step=step,
            draft=self.place.begin(step, plans[0]["token"]),
            num_bytes=sum(plan["bytes"] for plan in plans),
            again=plans[0]["again"],
            begun=time.monotonic(),
            staged=staged,
            part=Future(),
        )
        flight.part = self._thread.submit(self._write, flight, encoded)
        if self._ranks.world_size == 1:  # nobody has to be asked: the commit need not wait for the next step
            flight.ending = True
            flight.end = self._thread.submit(self._conclude_alone, flight)
        self._flight = flight
        if not self._overlapped:
            self.wait_staged()
        if wait:
            self.wait()

    def wait_staged(self) -> None:
        """Returns when the tensors of the last save may change."""
        if self._flight is not None:
            wait_for([self._flight.staged], self._deadline_seconds)
            if not self._flight.staged.done():
                raise self._overdue(self._flight, [self._ranks.rank])
            self._flight.staged.result()

    def poll(self) -> list[Saved | SaveFailed]:
        """Saves that finished since the last poll; never waits for a disk. A bug in the background is raised here."""
        if self._flight is not None:
            self._advance(self._flight, seconds=0.0)
        finished, self._finished = self._finished, []
        return finished

    def wait(self) -> None:
        """Returns when no save is in flight.

        Raises:
            RunFailed: a rank's part of it has not reached its disk in the time that was given.
        """
        while self._flight is not None:
            self._advance(self._flight, seconds=1.0)

    def close(self) -> None:
        """Ends the thread. One process waits for the save in flight; one of several cannot know whether the others are
        still there to be asked: what `wait` has not seen the end of is given up, and the next save removes it."""
        try:
            if self._ranks.world_size == 1:
                self.wait()
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def load_latest(self, wanted: Wanted = reader.everything, *, at_most: int | None = None) -> LoadedCheckpoint | None:
        """The newest checkpoint that is intact for every rank, or None; nothing on the disk changes until the next
        save, which removes later ones. See `reader.load_latest`."""
        loaded = reader.load_latest(self.place, wanted=wanted, ranks=self._ranks, at_most=at_most)
        if loaded is not None:
            steps = together(self._ranks, lambda: self.place.steps() if self._ranks.rank == 0 else [])[0]
            self._proved, self._superseded = loaded.step, {step for step in steps if step > loaded.step}
        return loaded

    # in the main thread

    def _is_there(self, step: int) -> bool:
        """Nothing is written twice: a run that is stopped right after a save saves the same step again."""
        if step != self._proved or self._ranks.rank != 0:
            return False
        try:
            return step in self.place.steps()
        except OSError:
            return False

    def _advance(self, flight: _Flight, *, seconds: float) -> None:
        """Takes the save a step further, after at most `seconds` of waiting for this rank's own thread. All ranks see
        the same reports, and so do the same."""
        waiting = seconds > 0
        own = flight.end if flight.ending else flight.part
        if own is not None:
            wait_for([own], seconds)
        late = waiting and time.monotonic() - flight.begun > self._deadline_seconds
        reports = self._ranks.gather(_report(own, late) if own is not None else {})
        if flight.ending:
            reports = reports[:1]
        late_ranks = [rank for rank, report in enumerate(reports) if report.get("late")]
        if late_ranks:
            self._flight = None
            raise self._overdue(flight, late_ranks)
        if any(report.get("pending") for report in reports):
            return
        if not flight.ending and not any("bug" in report for report in reports):
            flight.ending = True
            if self._ranks.rank == 0:
                flight.end = self._thread.submit(self._conclude, flight, reports)
            return
        self._flight = None
        if own is not None:
            _raise_bug(own)
        raise_told([report.get("bug") for report in reports])
        self._note(flight, reports[0]["done"])

    def _note(self, flight: _Flight, outcome: dict[str, Any]) -> None:
        if "reason" in outcome:
            self._finished.append(SaveFailed(**outcome))
            return
        self._finished.append(Saved(**outcome))
        self._proved = flight.step
        self._superseded.discard(flight.step)

    def _overdue(self, flight: _Flight, late: list[int]) -> RunFailed:
        who = "" if self._ranks.world_size == 1 else f" of rank {', '.join(map(str, late))}"
        return RunFailed(
            f"the checkpoint {self.place.describe(flight.step)}{who} has not reached the disk for "
            f"{self._deadline_seconds:.0f} s; the checkpoints before it are as they were"
        )

    # in the background thread

    def _write(self, flight: _Flight, state: bytes) -> dict[str, Any]:
        staged = flight.staged.result()
        begin = time.monotonic()
        index = Index({}, {})
        if self._ranks.rank == 0:
            self.place.clean()
        if not flight.again:
            if self._ranks.rank == 0:
                self._check_space(flight.num_bytes)
            index = write_part(flight.draft, self._ranks.rank, self._ranks.world_size, staged, state)
        return {"index": pack(index), "seconds": time.monotonic() - begin}

    def _conclude_alone(self, flight: _Flight) -> dict[str, Any]:
        _raise_bug(flight.part)
        return self._conclude(flight, [_report(flight.part)])

    def _conclude(self, flight: _Flight, reports: list[dict[str, Any]]) -> dict[str, Any]:
        """Commits, or removes what was written; then deletes what need not be kept."""
        failed = [(rank, report["failed"]) for rank, report in enumerate(reports) if "failed" in report]
        if failed:
            flight.draft.abandon()
            named = [reason if self._ranks.world_size == 1 else f"rank {rank}: {reason}" for rank, reason in failed]
            return {"step": flight.step, "reason": "; ".join(named)}
        parts = [report["done"] for report in reports]
        begin = time.monotonic()
        # What the run went back behind goes before the commit, so that a crash in between does not bring it back.
        notes = [self._remove(self._superseded)]
        try:
            if not flight.again:
                self._commit(flight, merge(unpack(part["index"]) for part in parts))
        except OSError as error:
            flight.draft.abandon()
            return {"step": flight.step, "reason": str(error)}
        seconds = max(part["seconds"] for part in parts) + time.monotonic() - begin
        notes.append(self._prune(flight.step))
        return {
            "step": flight.step,
            "place": self.place.describe(flight.step),
            "num_bytes": flight.num_bytes,
            "seconds": seconds,
            "note": "; ".join(filter(None, notes)),
        }

    def _commit(self, flight: _Flight, index: Index) -> None:
        """One of the same step that is intact stays as it is, for it may be the only one; others are replaced."""
        problem = index.problem()
        assert problem is None, problem
        is_there = flight.step in self.place.steps() and flight.step not in self._superseded
        if is_there and self._is_intact(flight.step):
            flight.draft.abandon()
        else:
            flight.draft.commit(encode(index, flight.step))

    def _is_intact(self, step: int) -> bool:
        try:
            reader.verify(self.place, step)
        except Corrupt:
            return False
        except RunFailed as error:  # the place does not answer: this save fails, the run goes on
            raise OSError(str(error)) from error
        return True

    def _prune(self, newest: int) -> str:
        """Keeps the last `keep` checkpoints up to `newest`, which was just committed; superseded ones never count.

        With checkpoints 10, 20 and a corrupt 30, newest 20 and keep 1: only 20 stays, so 30 cannot hide it later.
        """
        try:
            steps = [step for step in self.place.steps() if step <= newest and step not in self._superseded - {newest}]
        except OSError as error:
            return f"old checkpoints are still there: {error}"
        return self._remove(set(steps[: -self._keep]))

    def _remove(self, steps: set[int]) -> str:
        """Deletes those of them that are there; returns what went wrong. The next save tries again."""
        try:
            there = steps.intersection(self.place.steps())
            if there:
                self.place.remove(there)
        except OSError as error:
            return f"an old checkpoint is still there: {error}"
        return ""

    def _check_space(self, needed: int) -> None:
        free = self.place.free_bytes()
        if free is not None and needed > free:
            sizes = f"{needed / 2**20:.1f} MiB needed, {free / 2**20:.1f} MiB free"
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {sizes}", str(self.place))


def _piece(value: Piece | Tensor) -> Piece:
    return Piece.all_of(value) if isinstance(value, Tensor) else value


def _report(future: Future[dict[str, Any]], late: bool = False) -> dict[str, Any]:
    """How a background job stands, as JSON: one of `pending` (and `late`), `done`, `failed` and `bug`."""
    if not future.done():
        return {"pending": True, "late": late}
    error = future.exception()
    if error is None:
        return {"done": future.result()}
    if isinstance(error, OSError):
        return {"failed": str(error)}
    if not isinstance(error, Exception):
        raise error
    return {"bug": told(error)}


def _raise_bug(future: Future[Any]) -> None:
    """This rank's own, with where it happened."""
    error = future.exception()
    if error is not None and not isinstance(error, OSError):
        raise error
