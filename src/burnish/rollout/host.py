"""The part of a rollout worker that runs in its process: commands in, messages out, and an engine between them.

It steps the engine while there is work and obeys between two steps, so new weights reach requests that are in flight.
Every step, and every tensor that arrives, is a sign of life. It must not know what carries its messages, nor that there
are other workers.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from burnish.child import die_with_parent
from burnish.errors import BurnishError, RunFailed, SyncFailed, UserError
from burnish.rollout.host_wire import Wire

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from torch import Tensor

    from burnish.rollout.engine import Engine, EngineSetup, LiveEngine, Receipt, Weights
    from burnish.rollout.sync.base import Receiver, WeightSync
    from burnish.rollouts import Completion, Request


class Open(NamedTuple):
    """Load the engine; the first command."""

    engine: Engine
    setup: EngineSetup
    sync: WeightSync
    beat_seconds: float
    """Longest time between two signs of life of a worker that has nothing to do."""


class Submit(NamedTuple):
    """Queue requests."""

    epoch: int
    """Counts aborts: what comes of requests is said with it."""
    requests: list[Request]


class Abort(NamedTuple):
    """Forget all requests."""


class Update(NamedTuple):
    """Take the weights of a parcel."""

    parcel: dict[str, Any]


class Sleep(NamedTuple):
    """Give the memory to the trainer, or take it back."""

    asleep: bool


class Stop(NamedTuple):
    """Close the engine and end."""


class Beat(NamedTuple):
    """A sign of life."""

    phase: str
    """What is begun: load, idle, step, update, sleep or wake."""
    facts: dict[str, float]
    """The engine's counters."""


class Opened(NamedTuple):
    """The engine is loaded, and holds no published weights."""


class Done(NamedTuple):
    """Requests that are finished."""

    epoch: int
    completions: list[Completion]
    facts: dict[str, float]


class Holds(NamedTuple):
    """Weights have been taken."""

    receipt: Receipt


class Missed(NamedTuple):
    """Weights could not be taken, and the engine holds none."""

    version: int
    words: str


class Asleep(NamedTuple):
    """A `Sleep` was obeyed."""

    asleep: bool


class Broke(NamedTuple):
    """The worker ends."""

    error: bytes | None
    """Pickled, where it is one of the project's own; a person's error is theirs wherever it is raised."""
    words: str


Command = Open | Submit | Abort | Update | Sleep | Stop
Message = Beat | Opened | Done | Holds | Missed | Asleep | Broke


class Host:
    """Serves one engine until it is told to stop, or nobody is there to tell it."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._live: LiveEngine
        self._receiver: Receiver
        self._epoch = 0
        self._usable = True
        """Whether the engine may be stepped: not after weights that it could not take."""
        self._beat_seconds, self._last_beat, self._phase = 1.0, -1.0, ""

    def serve(self) -> int:
        """The exit code of the worker's process."""
        self._beat("start")
        try:
            commands = self._wire.wait(float("inf")) if not self._wire.closed else []
            if commands:
                self._run(pickle.loads(commands[0]), commands[1:])
            return 0
        except BaseException as error:  # whatever it is, who started this process sees no other trace of it
            self._say(Broke(_pickled(error), traceback.format_exc()))
            return 1

    def _run(self, order: Open, commands: list[bytes]) -> None:
        self._beat_seconds = order.beat_seconds
        self._beat("load")
        self._live = order.engine.open(order.setup)
        self._receiver = order.sync.receiver()
        self._say(Opened())
        try:
            while not self._wire.closed:
                if not self._obey_all([pickle.loads(command) for command in commands]):
                    break
                busy = self._usable and self._live.num_unfinished > 0
                if busy:
                    self._step()
                else:
                    self._beat("idle")
                commands = self._wire.wait(0.0 if busy else self._beat_seconds)
        finally:
            with contextlib.suppress(Exception):  # it ends, and what goes wrong on the way is no news to anybody
                self._receiver.close()
                self._live.close()

    def _step(self) -> None:
        self._beat("step")
        done = self._live.step()
        if done:
            self._say(Done(self._epoch, done, self._live.facts()))

    def _obey_all(self, commands: Sequence[Command]) -> bool:
        """False: it was told to stop. Of several weights only the last are taken."""
        newest = max((at for at, command in enumerate(commands) if isinstance(command, Update)), default=-1)
        for at, command in enumerate(commands):
            if isinstance(command, Submit):
                self._epoch = command.epoch
                self._live.submit(command.requests)
            elif isinstance(command, Abort):
                self._live.abort()
            elif isinstance(command, Update) and at == newest:
                self._update(command.parcel)
            elif isinstance(command, Sleep):
                self._beat("sleep" if command.asleep else "wake")
                (self._live.sleep if command.asleep else self._live.wake)()
                self._say(Asleep(command.asleep))
            elif isinstance(command, Stop):
                return False
        return True

    def _update(self, parcel: dict[str, Any]) -> None:
        self._beat("update")
        self._usable = False
        try:
            receipt = self._live.update_weights(Arriving(self._receiver.receive(parcel, self.arrived), self))
        except SyncFailed as error:
            self._say(Missed(parcel["version"], str(error)))
            return
        self._usable = True
        self._say(Holds(receipt))

    def arrived(self) -> None:
        """A part of new weights is there."""
        self._beat("update")

    def _beat(self, phase: str) -> None:
        now = time.monotonic()
        if phase != self._phase or now - self._last_beat >= min(self._beat_seconds, 0.5):
            facts = self._live.facts() if phase in ("idle", "step") else {}
            self._phase, self._last_beat = phase, now
            self._say(Beat(phase, facts))

    def _say(self, message: Message) -> None:
        self._wire.send(pickle.dumps(message))
        self._wire.flush()


class Arriving:
    """Weights whose every tensor is a sign of life; see `Weights`."""

    def __init__(self, weights: Weights, host: Host) -> None:
        self._weights, self._host = weights, host
        self.version, self.adapter_only = weights.version, weights.adapter_only

    @property
    def digest(self) -> str:
        return self._weights.digest

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for named in self._weights.tensors():
            self._host.arrived()
            yield named

    def folder(self) -> Path:
        return self._weights.folder()


def _pickled(error: BaseException) -> bytes | None:
    """None: it is not for a person, or an error of a team's own that does not travel."""
    if not isinstance(error, BurnishError):
        return None
    data = pickle.dumps(error)
    try:
        pickle.loads(data)
    except Exception:  # a subclass whose arguments are not its state; its words travel
        return pickle.dumps(UserError(str(error)) if isinstance(error, UserError) else RunFailed(str(error)))
    return data


def main(end: int, parent: int, cpus: list[int] | None) -> None:
    """A worker's process.

    Args:
        end: file descriptor of its end of the socket pair.
        parent: process id of who started it.
        cpus: cores that it may run on; None: all.
    """
    die_with_parent(parent)
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the trainer, which ends its workers
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    if cpus is not None and sys.platform == "linux":
        os.sched_setaffinity(0, cpus)
    code = Host(Wire(socket.socket(fileno=end))).serve()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # threads of an engine that was not closed would keep it
