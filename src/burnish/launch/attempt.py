"""One group of ranks from its start to its end: who died, who hangs, who was asked to stop.

Must not know what follows from it: whether there is another attempt is the supervisor's to say (`supervise.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from burnish.errors import EXIT_DONE, EXIT_STOPPED
from burnish.launch.blame import first_failing, hanging, is_echo
from burnish.launch.heartbeat import Silence
from burnish.launch.worker_group import Beat, Ended, Outcome, WorkerGroup

SETTLE_SECONDS = 1.0
"""So long a broken connection waits for news of the rank that broke it: one that fails by itself closes its connections
some tenths of a second before its process ends."""


class Report(Protocol):
    """Where a person reads what happened."""

    def event(self, kind: str, **facts: Any) -> None:
        """For the run's events."""
        ...

    def note(self, text: str) -> None:
        """For whoever watches now."""
        ...

    def stacks(self, rank: int, attempt: int, text: str) -> str:
        """Keeps a rank's stacks for later; returns the file's name."""
        ...


class Limits(NamedTuple):
    """What the recipe allows; see `supervised.py`."""

    max_restarts: int
    heartbeat_seconds: float
    start_seconds: float
    grace_seconds: float


class Failure(NamedTuple):
    """An attempt that ended early, and may be repeated."""

    what: str
    """One line: `rank 1 at step 7: ended by SIGKILL`."""
    words: str = ""
    """The traceback, where there is one."""
    place: tuple[int, str] | None = None
    """Beats and exception of a rank that failed by an error of its own; an error of the code comes again there."""


class Grown:
    """The ranks have stopped to make room for more of them."""


class Attempt:
    """Watches `group` until it has ended, in one way or another; whoever made the group kills what is left of it.

    Args:
        number: of this attempt; the first is 1.
        failed_at: when the attempt before failed, by `clock`.
        has_room: whether more ranks could be had than there are; the ranks are then stopped with a checkpoint.
    """

    def __init__(
        self,
        group: WorkerGroup,
        number: int,
        limits: Limits,
        report: Report,
        *,
        failed_at: float | None = None,
        stop_requested: Callable[[], str | None] = lambda: None,
        has_room: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._group, self._number, self._limits, self._report = group, number, limits, report
        self._failed_at, self._stop_requested, self._has_room, self._clock = failed_at, stop_requested, has_room, clock
        self._silence = Silence(group.size, limits.heartbeat_seconds, limits.start_seconds, clock)
        self._ended: list[Ended] = []
        self._first_failed_at = self._asked_at = float("inf")
        self._grows = False

    def watch(self) -> Outcome | Failure | Grown:
        """How it ended. An `Outcome` is the run's: there is nothing to repeat."""
        while True:
            self._ended += self._group.wait(self._silence.look_every)
            beats = self._group.beats()
            self._report_restart(beats)
            ending = self._ending(beats)
            if ending is not None:
                return ending
            ended = {each.rank for each in self._ended}
            overdue = [rank for rank in self._silence.look(beats) if rank not in ended]
            if self._stop_requested() is None and overdue:
                return self._hung([rank for rank in range(self._group.size) if rank not in ended], beats)
            if self._stop_requested() is not None and self._asked_at == float("inf"):
                self._group.stop()
                self._asked_at = self._clock()
            if self._stop_requested() is None and not self._grows and self._has_room():
                self._grows = True
                self._group.stop()
            late = self._clock() - self._asked_at
            if late >= self._limits.grace_seconds:
                return self._stopped(f"not all ranks finished their step and a checkpoint within {late:.0f} s")

    def _report_restart(self, beats: Sequence[Beat]) -> None:
        """Once every rank is back at work, or had none left."""
        done = {each.rank for each in self._ended if each.outcome.code == EXIT_DONE}
        if self._failed_at is not None and all(beat.started or rank in done for rank, beat in enumerate(beats)):
            seconds = round(self._clock() - self._failed_at, 3)
            self._report.event("restarted", attempt=self._number, ranks=self._group.size, seconds=seconds)
            self._failed_at = None

    def _ending(self, beats: Sequence[Beat]) -> Outcome | Failure | Grown | None:
        """What those that ended so far say of the whole; None: nothing yet."""
        first = first_failing(self._ended)
        everyone = len(self._ended) == self._group.size
        if first is not None:
            self._first_failed_at = min(self._first_failed_at, self._clock())
            settled = everyone or self._clock() - self._first_failed_at >= SETTLE_SECONDS
            return self._died(first, beats[first.rank]) if settled or not is_echo(first.outcome) else None
        if not everyone:
            return None
        paused = [each.outcome for each in self._ended if each.outcome.code == EXIT_STOPPED]
        if not paused:
            return Outcome(EXIT_DONE)
        if self._grows and self._stop_requested() is None:
            return Grown()
        return next((outcome for outcome in paused if outcome.words), paused[0])

    def _died(self, first: Ended, beat: Beat) -> Outcome | Failure:
        rank, outcome = first
        if not outcome.retry:
            return outcome
        what = f"rank {rank}{_at(beat)}: {outcome.summary()}"
        if self._stop_requested() is not None:
            return self._stopped(what)
        facts = {"traceback": outcome.words} if "\n" in outcome.words else {}
        facts |= {"details": outcome.details} if outcome.details else {}
        reason = outcome.summary()
        self._report.event("worker_died", attempt=self._number, rank=rank, phase=beat.phase, reason=reason, **facts)
        self._report.note(what)
        own = outcome.code > 0 and not is_echo(outcome)
        return Failure(what, outcome.words, (beat.count, reason.partition(":")[0]) if own else None)

    def _hung(self, running: Sequence[int], beats: Sequence[Beat]) -> Failure:
        stacks = self._group.stacks(running)
        lines = []
        for rank in hanging(stacks, beats):
            seconds, beat = round(self._silence.seconds[rank], 3), beats[rank]
            what = f"rank {rank}{_at(beat)}: not heard of for {seconds:.3g} s"
            facts: dict[str, Any] = {"attempt": self._number, "rank": rank, "phase": beat.phase, "seconds": seconds}
            if stacks[rank].stopped:
                what += ", and did not answer"
            if stacks[rank].text:
                facts["stacks"] = self._report.stacks(rank, self._number, stacks[rank].text)
                what += f"; where it stood is in {facts['stacks']}"
            self._report.event("worker_hung", **facts, stopped=stacks[rank].stopped)
            self._report.note(what)
            lines.append(what)
        return Failure("; ".join(lines))

    def _stopped(self, why: str) -> Outcome:
        """By a signal, but not as it should."""
        words = f"stopped ({self._stop_requested()}) without a last checkpoint: {why}; the same command goes on from "
        return Outcome(EXIT_STOPPED, words + "the newest one", retry=False)


def _at(beat: Beat) -> str:
    return f" at {beat.phase}" if beat.phase else ""
