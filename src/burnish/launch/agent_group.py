"""Ranks of one attempt behind agents on the nodes of a cluster (`agent.py`): who ended, who has come how far.

What carries calls to agents is a `Carrier`. It may tell at once that an agent has ended; that one does not answer any
more is found out here, by the clock. Must not know what cluster it is.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from burnish.launch.agent import OUT, Place, Told
from burnish.launch.heartbeat import Silence
from burnish.launch.worker_group import Beat, Ended, Outcome, Stack

POLL_SECONDS = 0.5
"""Longest that an agent listens to its rank before it answers; a rank that ends or prints is told of at once."""

STACKS_SECONDS = 5.0
"""An agent takes two seconds at most to ask its rank where it stands."""

KILL_SECONDS = 12.0
"""An agent takes ten seconds at most to kill its rank."""


class Gone(Exception):
    """The agent has ended, and its rank with it; holds what the cluster says about it."""


class Carrier(Protocol):
    """Calls to the agents of a group, by rank."""

    def call(self, rank: int, method: str, *arguments: Any) -> Any:
        """Begins a call; what stands for its answer."""
        ...

    def answered(self, calls: Sequence[Any], seconds: float) -> list[Any]:
        """Those of `calls` that have an answer, or never will; waits so long for the first."""
        ...

    def answer(self, call: Any) -> Any:
        """What was answered. Raises Gone; OSError: not reached now, which may pass."""
        ...

    def end(self, ranks: Sequence[int]) -> list[int]:
        """Kills agents that do not answer; returns those that have ended. The nodes of the others do not answer."""
        ...


class AgentGroup:
    """Ranks whose agents have been told to start them.

    Args:
        places: of the agents, by rank.
        lost_seconds: an agent that does not answer for so long is lost.
        lost_nodes: takes in the nodes that do not answer.
    """

    def __init__(self, carrier: Carrier, places: Sequence[Place], lost_seconds: float, lost_nodes: set[str]) -> None:
        self.size = len(places)
        self._carrier, self._places, self._lost_nodes = carrier, list(places), lost_nodes
        self._beats = [Beat(0, "")] * self.size
        self._num_answers = [0] * self.size
        self._silence = Silence(self.size, lost_seconds, lost_seconds)
        self._polls: dict[Any, int] = {}
        """Rank of every call that is waited for."""
        self._due = dict.fromkeys(range(self.size), 0.0)
        """Ranks to be asked again, and not before when."""
        self._running = set(range(self.size))
        self._silent: set[int] = set()
        """Ranks whose agents do not answer."""
        self._gone: set[int] = set()
        """Ranks whose agents have ended."""
        self._news: list[Ended] = []

    def wait(self, seconds: float) -> list[Ended]:
        """See `WorkerGroup`."""
        until = time.monotonic() + seconds
        while True:
            self._ask(min(max(seconds, 0.02), POLL_SECONDS))
            self._hear(min(max(until - time.monotonic(), 0.0), 0.1))
            if self._news or time.monotonic() >= until:
                break
        news, self._news = self._news, []
        return news

    def beats(self) -> list[Beat]:
        """See `WorkerGroup`."""
        return list(self._beats)

    def stop(self) -> None:
        """See `WorkerGroup`."""
        for rank in self._running:
            self._carrier.call(rank, "stop")

    def stacks(self, ranks: Sequence[int]) -> dict[int, Stack]:
        """See `WorkerGroup`. An agent that does not answer is stopped as a whole, by a signal or with its node."""
        found = self._collect("stacks", ranks, STACKS_SECONDS)
        return {rank: found.get(rank, Stack("", stopped=True)) for rank in ranks}

    def kill(self) -> None:
        """See `WorkerGroup`. Nobody can tell what a node without an answer still runs; it cannot join later ranks."""
        told = self._collect("kill", range(self.size), KILL_SECONDS)
        for call, rank in self._polls.items():
            if rank in told:  # an agent does one thing after another: it has answered this before
                with contextlib.suppress(OSError, Gone):
                    show(rank, self._carrier.answer(call).lines)
        for rank, last in told.items():
            show(rank, last.lines)
        silent = sorted(self._silent - self._gone)
        ended = self._carrier.end(silent) if silent else []
        self._lost_nodes |= {self._places[rank].node for rank in silent if rank not in ended}
        self._gone |= self._silent
        self._running.clear()
        self._polls.clear()
        self._due.clear()

    def _ask(self, seconds: float) -> None:
        for rank in [rank for rank, when in self._due.items() if when <= time.monotonic()]:
            self._polls[self._carrier.call(rank, "poll", seconds)] = rank
            del self._due[rank]

    def _hear(self, seconds: float) -> None:
        """Takes in what was answered, waiting so long for the first; then looks for agents that do not answer."""
        if self._polls:
            for call in self._carrier.answered(list(self._polls), seconds):
                self._take(self._polls.pop(call), call)
        else:
            time.sleep(seconds)
        for rank in self._silence.look([Beat(count, "") for count in self._num_answers]):
            if rank in self._running:
                self._silent.add(rank)
                self._lose(rank, "does not answer")

    def _take(self, rank: int, call: Any) -> None:
        if rank not in self._running:
            return
        try:
            told: Told = self._carrier.answer(call)
        except OSError:
            self._due[rank] = time.monotonic() + POLL_SECONDS
            return
        except Gone as error:
            self._gone.add(rank)
            self._lose(rank, "has ended", str(error))
            return
        self._num_answers[rank] += 1
        self._beats[rank] = told.beat
        show(rank, told.lines)
        if told.outcome is None:
            self._due[rank] = 0.0
        else:
            self._end(rank, told.outcome)

    def _lose(self, rank: int, how: str, details: str = "") -> None:
        words = f"its agent on {self._places[rank].address} {how}"
        self._end(rank, Outcome(-signal.SIGKILL, words, details=details))

    def _end(self, rank: int, outcome: Outcome) -> None:
        self._running.discard(rank)
        self._news.append(Ended(rank, outcome))

    def _collect(self, method: str, ranks: Iterable[int], seconds: float) -> dict[int, Any]:
        """What agents answered in time, by rank. Those that did not are silent, and not asked any more."""
        calls = {self._carrier.call(rank, method): rank for rank in ranks if rank not in self._gone | self._silent}
        found, until = {}, time.monotonic() + seconds
        while calls and (left := until - time.monotonic()) > 0:
            for call in self._carrier.answered(list(calls), left):
                rank = calls.pop(call)
                try:
                    found[rank] = self._carrier.answer(call)
                except OSError:
                    self._silent.add(rank)
                except Gone:
                    self._gone.add(rank)
        self._silent |= set(calls.values())
        return found


def show(rank: int, lines: Sequence[tuple[int, str]]) -> None:
    """Prints what a rank printed: rank 0's as it did, the others' to standard error, behind their number."""
    for stream, line in lines:
        to = sys.stdout if rank == 0 and stream == OUT else sys.stderr
        with contextlib.suppress(OSError):  # a closed pipe, a terminal that is gone: a run does not end for it
            print(line if rank == 0 else f"[{rank}] {line}", file=to, flush=True)
