"""One place of a pool of rollout workers: the process that is in it now, and how it is.

    STARTING   it loads its engine
    STALE      it does not hold the published weights; nobody samples from it
    HEALTHY    it does
    SUSPECT    it was silent for half of the limit; it is given nothing new
    DEAD       it ended or was ended, and is started anew when its pause is over

A worker that is started anew goes the whole way: from DEAD nothing leads to HEALTHY but a receipt.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import time
from collections import deque
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from burnish.rollout.host import Beat, Command, Done, Message

if TYPE_CHECKING:
    from burnish.rollout.host_process import Heard
    from burnish.rollouts import Request

LONGEST_PAUSE_SECONDS = 30.0
"""Before another start without a completion since the last: 0, 1, 2, 4, ... s."""

STACKS_SECONDS = 0.5
"""A worker that can say where it stands does so within milliseconds."""

LOG_LINES = 60
"""Of what a worker printed last, for the error that it ends with: a stack and a little before it."""


class Link(Protocol):
    """A started worker, whatever carries it."""

    @property
    def pid(self) -> int | None:
        """Of the process that the engine is in, once it is known."""
        ...

    @property
    def place(self) -> str:
        """For people: `process 4711`, `process 4711 on 10.0.0.7`."""
        ...

    def send(self, frame: bytes) -> None:
        """Queues a frame; never waits."""
        ...

    def hear(self) -> Heard:
        """What has come; never waits."""
        ...

    def ask(self) -> None:
        """Has it print where it stands, if it can."""
        ...

    def kill(self) -> None:
        """Ends it and what it started, within a few seconds."""
        ...


L = TypeVar("L", bound=Link)


class Starter(Protocol[L]):
    """What starts workers."""

    def start(self, index: int, order: bytes) -> L:
        """Starts worker `index` with its first frame; does not wait for it. Raises OSError."""
        ...

    def wait(self, links: Sequence[L], seconds: float) -> None:
        """Returns when something came from one of them, or after `seconds`."""
        ...

    def close(self) -> None:
        """All workers have ended."""
        ...


class Limits(NamedTuple):
    """How long is too long, and how often is too often."""

    heartbeat_seconds: float
    start_seconds: float
    sync_seconds: float
    max_restarts: int


class State(Enum):
    """See the head of this file."""

    STARTING = "starting"
    STALE = "stale"
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    DEAD = "dead"


class Worker:
    """A place of the pool. It decides nothing about others."""

    def __init__(self, index: int, limits: Limits) -> None:
        self.index, self._limits = index, limits
        self.link: Link | None = None
        self.state = State.DEAD
        self.assigned: dict[str, Request] = {}
        """What it has not finished, by id."""
        self.asked_version: int | None = None
        """Of weights that it was told to take, and has not said that it holds."""
        self.asked_at = 0.0
        self.asleep = False
        self.failures: list[str] = []
        """Since it last finished a request, one line each."""
        self.failing_since = self.finished_at = 0.0
        """When the first of those happened, and when it last finished a request."""
        self.due = 0.0
        """When it may be started again."""
        self.facts: dict[str, float] = {}
        self.phase = ""
        self.silent = self.updating = 0.0
        """Seconds since a sign of life, and since it was told to take weights."""
        self._ended_facts: dict[str, float] = {}
        """Sums of its processes that have ended."""
        self.started_at = 0.0
        self.is_anew = False
        """Whether it was started again, and has not held the published weights since."""
        self._log: deque[str] = deque(maxlen=LOG_LINES)
        self.words = ""
        """What it said about its own end."""

    def __str__(self) -> str:
        return f"rollout worker {self.index}" + (f" ({self.link.place})" if self.link else "")

    @property
    def pid(self) -> int | None:
        return self.link.pid if self.link else None

    @property
    def seconds(self) -> float:
        """Since its process was started."""
        return time.monotonic() - self.started_at

    def begin(self, link: Link) -> None:
        """A process is in it."""
        self.link, self.state = link, State.STARTING
        self.phase, self.silent, self.started_at, self.words = "start", 0.0, time.monotonic(), ""
        self._log.clear()

    def send(self, command: Command) -> None:
        """Nothing where it is dead."""
        if self.link is not None:
            self.link.send(pickle.dumps(command))

    def hear(self) -> tuple[list[Message], str | None]:
        """What it said since the last call, and how it ended if it has."""
        if self.link is None:
            return [], None
        heard = self.link.hear()
        messages: list[Message] = [pickle.loads(frame) for frame in heard.frames]
        for message in messages:
            self.silent = 0.0
            if isinstance(message, Beat):
                self.phase = message.phase
            if isinstance(message, Beat | Done) and message.facts:
                self.facts = message.facts
        self._print(heard.lines)
        if self.state is State.SUSPECT and messages:
            self.state = State.HEALTHY
        return messages, heard.ended

    def overdue(self, passed: float) -> str | None:
        """Counts the seconds since the last look; why it is taken for hung, if it is.

        Of a long time between two looks only a part counts: who was suspended, or computed for a minute, does not take
        all workers for hung when it looks again.
        """
        loads = self.state is State.STARTING
        limit = self._limits.start_seconds if loads else self._limits.heartbeat_seconds
        self.silent += min(passed, limit / 4)
        if self.asked_version is not None:
            self.updating += min(passed, self._limits.sync_seconds / 4)
        if self.silent >= limit:
            return f"no sign of life for {limit:g} s, in the phase `{self.phase}`"
        if self.state is State.HEALTHY and self.silent >= limit / 2:
            self.state = State.SUSPECT
        return None

    def stacks(self) -> str:
        """Where a hung one stands, as far as it says."""
        if self.link is None:
            return ""
        self.link.ask()
        until, found = time.monotonic() + STACKS_SECONDS, list[str]()
        while time.monotonic() < until:
            time.sleep(0.05)
            lines = self.link.hear().lines
            self._print(lines)
            found += lines
            if found and not lines:
                break
        return "\n".join(found)

    def end(self, failure: str) -> None:
        """Kills it, and says when it may be started again."""
        if self.link is not None:
            self.link.kill()
        for name, value in self.facts.items():
            self._ended_facts[name] = self._ended_facts.get(name, 0.0) + value
        if not self.failures:
            self.failing_since = time.monotonic()
        self.failures.append(failure)
        count = len(self.failures)
        pause = 0.0 if count == 1 else min(2.0 ** (count - 2), LONGEST_PAUSE_SECONDS)
        self.due = time.monotonic() + pause
        self.link, self.state, self.facts, self.assigned = None, State.DEAD, {}, {}
        self.asked_version, self.updating, self.asleep, self.is_anew = None, 0.0, False, True

    def totals(self) -> dict[str, float]:
        """The facts of all processes that were in it."""
        names = self._ended_facts.keys() | self.facts.keys()
        return {name: self._ended_facts.get(name, 0.0) + self.facts.get(name, 0.0) for name in names}

    def last_words(self) -> str:
        """What it said about its end, or else printed last."""
        return self.words or "\n".join(self._log)

    def _print(self, lines: Sequence[str]) -> None:
        self._log.extend(lines)
        with contextlib.suppress(OSError):  # a closed terminal: nobody reads it, and a run does not end for it
            for line in lines:
                print(f"[rollout {self.index}] {line}", file=sys.stderr, flush=True)
