"""What supervision asks of whatever carries a run's ranks: processes of this machine, actors of a cluster.

A `Backend` starts the ranks of one attempt together as a `WorkerGroup`, which says who ended and how, and how far each
has come. It decides nothing: when to give up a rank, and what then, is the supervisor's (`supervise.py`). Must not know
recipes, checkpoints or the run folder.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from burnish.child import how_it_ended
from burnish.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_REFUSED,
    EXIT_STOPPED,
    BurnishError,
    RefusedElsewhere,
    Unreachable,
)


@dataclass(frozen=True, slots=True)
class Beat:
    """How far a rank has come."""

    count: int
    """Beats since it was started; 0: none yet. It only grows, and no clock is in it: a clock may jump."""
    phase: str
    """What it was about to do at the last one, for example `step 12`; `start` while it is made ready."""

    @property
    def started(self) -> bool:
        """Whether the model is loaded and the first step begun."""
        return self.phase not in ("", "start")


class Outcome(NamedTuple):
    """How a rank's work ended."""

    code: int
    """Exit code (see `errors.py`); -9: ended by signal 9, or lost with its node."""
    words: str = ""
    """What a person should read about it: an error's message, or a traceback; may be empty where a signal ended it."""
    retry: bool = True
    """False: it would end so again. A person's error, a pause, and a run that failed by itself."""
    echo: bool = False
    """It only says that another rank has ended."""
    details: str = ""
    """For the run's events alone: what a cluster says about a rank that it has lost."""

    def summary(self) -> str:
        """One line: `ended by SIGKILL`, `ValueError: no such column`."""
        lines = self.words.strip().split("\n")
        if self.code >= 0:
            return lines[-1].strip() or f"exit code {self.code}"
        name = how_it_ended(self.code)
        return f"{name}: {lines[0]}" if lines[0] else name


class Ended(NamedTuple):
    """One rank has ended."""

    rank: int
    outcome: Outcome


class Stack(NamedTuple):
    """Where a rank stands, asked for because it is not heard of."""

    text: str
    """Python stacks of all its threads, innermost frame first, as faulthandler writes them; empty: it gave none."""
    stopped: bool
    """It gave none by itself: stopped by a signal, in a debugger, or stuck in the kernel."""


class WorkerGroup(Protocol):
    """The ranks of one attempt, 0 to `size` - 1. They were started together and end together."""

    size: int

    def wait(self, seconds: float) -> list[Ended]:
        """Ranks that ended since the last call, in the order they did.

        Returns as soon as there is one, else after `seconds`. A rank whose process is dead is among them within a
        second of its death, whatever killed it. Each rank is told of once.
        """
        ...

    def beats(self) -> list[Beat]:
        """Every rank's last beat, by rank. Never blocks: what is not known yet is what was known before."""
        ...

    def stop(self) -> None:
        """Asks every rank for a checkpoint after the step at hand, as SIGTERM does, and returns at once."""
        ...

    def stacks(self, ranks: Sequence[int]) -> dict[int, Stack]:
        """Asks ranks that are not heard of where they stand; takes a few seconds at most. They are killed afterwards,
        so one that was stopped may be continued for it."""
        ...

    def kill(self) -> None:
        """Ends every rank and what it started, at once; nothing of them runs any more when this returns. What they
        printed is shown by then. May be called again."""
        ...


class Backend(Protocol):
    """Where ranks are started."""

    def start(self, size: int, attempt: int) -> WorkerGroup:
        """Starts an attempt (the first is 1) with so many ranks, and does not wait for their first beat.

        The ranks find each other at an address that no earlier attempt had, so a rank that outlived its own attempt
        cannot join.

        Raises:
            OSError: they could not be started now; it is tried again like a rank that died.
        """
        ...

    def available(self) -> int:
        """How many ranks could be had now, counting those that run. Fast: it is asked between two looks at beats."""
        ...

    def close(self) -> None:
        """Gives back what was opened to start ranks; no group runs any more."""
        ...


def outcome_of(work: Callable[[], int]) -> Outcome:
    """Runs a rank's work where the rank is, and turns whatever comes of it into what the supervisor is told."""
    try:
        code = work()
        return Outcome(code, retry=code not in (EXIT_DONE, EXIT_REFUSED, EXIT_STOPPED))
    except BurnishError as error:
        return Outcome(
            error.exit_code, str(error), retry=isinstance(error, Unreachable), echo=isinstance(error, RefusedElsewhere)
        )
    except BaseException:  # a bug, a broken connection: the person at the other end sees no other trace of it
        return Outcome(EXIT_FAILED, traceback.format_exc())
