"""Keeping a run going: what dies or hangs is restarted from the last checkpoint, what cannot be helped ends it.

Attempts follow each other (`attempt.py`) until the run is done, paused or refused, or the budget of restarts is spent.
Where ranks run is a `Backend` (`worker_group.py`): the same decisions hold on this machine and on a cluster. Must not
know processes, actors, recipes or the files of a run folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from burnish.errors import EXIT_DONE, EXIT_REFUSED, EXIT_STOPPED, RestartsExhausted, RunFailed, Stopped, UserError
from burnish.launch.attempt import Attempt, Failure, Grown, Limits, Report
from burnish.launch.worker_group import Backend, Outcome

GROW_SECONDS = 180.0
"""From a start to the question whether there is room for more ranks: growing costs a checkpoint and a restart."""

LONGEST_PAUSE_SECONDS = 30.0
"""Before another restart without progress: 0, 1, 2, 4, ... s. What is broken for a minute costs no more of the budget
than that."""


class Supervisor:
    """Runs attempts until the run has ended.

    Args:
        worlds: numbers of ranks that are valid, ascending; one where the run is not elastic.
        size: most ranks of the first attempt, one of `worlds`.
        progress: step of the newest checkpoint; -1 without one.
        stop_requested: name of the signal that asked for a stop, if one did.
        clock: seconds that never jump back.
    """

    def __init__(
        self,
        backend: Backend,
        worlds: Sequence[int],
        size: int,
        limits: Limits,
        report: Report,
        *,
        progress: Callable[[], int],
        stop_requested: Callable[[], str | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        assert size in worlds, (size, worlds)
        self._backend, self._worlds, self._limits, self._report = backend, worlds, limits, report
        self._progress, self._stop_requested, self._clock, self._sleep = progress, stop_requested, clock, sleep
        self._size, self._most = size, size
        self._attempts = 0
        self._failures: list[Failure] = []
        """Since the last progress, which was `_reached`."""
        self._reached = progress()
        self._failed_at: float | None = None

    def run(self) -> int:
        """Returns 0 when the run is done.

        Raises:
            UserError: a rank refused its input.
            Stopped: by a signal, or by the recipe; the same command goes on.
            RestartsExhausted: it failed too often without a new checkpoint.
            RunFailed: by itself, by the same error at the same step twice, or because too few ranks can be had.
        """
        while True:
            ending = self._attempt()
            if isinstance(ending, Failure):
                self._failed_at = self._clock()
                self._count(ending)
                self._pause()
            elif isinstance(ending, Outcome):
                return _finish(ending)

    def _attempt(self) -> Outcome | Failure | Grown:
        size = self._room()
        if size != self._size:
            self._report.event("resized", attempt=self._attempts + 1, before=self._size, ranks=size)
            self._report.note(f"goes on with {size} ranks instead of {self._size}")
            self._size = size
        self._attempts += 1
        self._most = self._worlds[-1]
        try:
            group = self._backend.start(size, self._attempts)
        except OSError as error:
            self._report.note(f"the ranks could not be started: {error}")
            return Failure(f"the ranks could not be started: {error}")
        try:
            attempt = Attempt(
                group,
                self._attempts,
                self._limits,
                self._report,
                failed_at=self._failed_at,
                stop_requested=self._stop_requested,
                has_room=self._more_room(),
                clock=self._clock,
            )
            return attempt.watch()
        finally:
            group.kill()

    def _room(self) -> int:
        """Ranks of the next attempt: the most that are valid and can be had; waits for the fewest."""
        waited_from = self._clock()
        while True:
            available = self._backend.available()
            fitting = [size for size in self._worlds if size <= min(available, self._most)]
            if fitting:
                return fitting[-1]
            self._stop_if_asked()
            if self._clock() - waited_from >= self._limits.start_seconds:
                raise RunFailed(
                    f"the run needs {self._worlds[0]} ranks, and {available} could be had for "
                    f"{self._limits.start_seconds:.0f} s\n  cure: the same command goes on when there are more"
                )
            self._sleep(0.5)

    def _more_room(self) -> Callable[[], bool]:
        """Asks every few minutes whether a larger number of ranks is valid and can be had."""
        asked = self._clock()

        def more() -> bool:
            nonlocal asked
            larger = [size for size in self._worlds if size > self._size]
            if not larger or self._clock() - asked < GROW_SECONDS:
                return False
            asked = self._clock()
            return self._backend.available() >= larger[0]

        return more

    def _count(self, failure: Failure) -> None:
        """Takes one restart from the budget, which a new checkpoint fills again. Raises RunFailed: no more of them."""
        reached = max(self._progress(), self._reached)
        if reached > self._reached:
            self._reached = reached
            self._failures.clear()
        again = failure.place is not None and bool(self._failures) and failure.place == self._failures[-1].place
        self._failures.append(failure)
        if again:
            raise RunFailed(f"the same error at the same step twice:\n{failure.words or failure.what}")
        if len(self._failures) > self._limits.max_restarts:
            raise RestartsExhausted(tuple(each.what for each in self._failures), failure.words)
        source = f"checkpoint-{reached}" if reached >= 0 else "the beginning"
        used = f"{len(self._failures)} of {self._limits.max_restarts}"
        self._report.note(f"restarting from {source} (restart {used} since the last progress)")

    def _pause(self) -> None:
        """Nothing before the first restart since the last progress, then longer each time."""
        tries = len(self._failures) - 2
        until = self._clock() + (min(2.0**tries, LONGEST_PAUSE_SECONDS) if tries >= 0 else 0.0)
        while self._clock() < until:
            self._stop_if_asked()
            self._sleep(min(0.5, until - self._clock()))

    def _stop_if_asked(self) -> None:
        """Raises Stopped if a signal came while no rank runs."""
        name = self._stop_requested()
        if name is not None:
            raise Stopped(f"stopped ({name}) while no rank ran; the same command goes on from the newest checkpoint")


def _finish(outcome: Outcome) -> int:
    """The run's end as this process says it: its exit code, or the error that has it."""
    if outcome.code == EXIT_DONE:
        return EXIT_DONE
    if outcome.code == EXIT_REFUSED:
        raise UserError(outcome.words)
    if outcome.code == EXIT_STOPPED:
        raise Stopped(outcome.words or "stopped; the same command goes on")
    raise RunFailed(outcome.words)
