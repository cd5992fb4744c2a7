"""Engines in other processes, as the collector sees them: a fleet that loses no request and trusts no stale worker.

Requests of one prompt go to one worker, which computes the prompt once; a worker is given about as many as its engine
runs at once, and more as it finishes, so that none waits behind another's long ones. A worker that ends or is silent is
killed and started anew, what it had not finished is submitted again by id, and nothing that it may still have said is
listened to. It must not know what carries workers (`Starter`) or weights (`Sender`).
"""

from __future__ import annotations

import pickle
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from burnish.errors import BurnishError, RestartsExhausted, RunFailed, SyncFailed, UserError
from burnish.rollout.fleet import idle
from burnish.rollout.host import (
    Abort,
    Asleep,
    Broke,
    Done,
    Holds,
    Message,
    Missed,
    Open,
    Opened,
    Sleep,
    Stop,
    Submit,
    Update,
)
from burnish.rollout.pool_worker import Limits, Starter, State, Worker

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from burnish.rollout.engine import Receipt
    from burnish.rollout.fleet import Event
    from burnish.rollout.sync.base import Sender
    from burnish.rollouts import Completion, Request

LOOK_SECONDS = 0.1
"""Longest time between two looks at the workers while something is waited for."""

STOP_SECONDS = 2.0
"""So long engines may take to close at the end, before their processes are killed."""

NUM_HOMES = 4096
"""Prompts whose worker is remembered, for later turns."""


class Pool:
    """A `Fleet` of workers.

    Args:
        order: what each worker is told first.
        capacity: requests that one engine runs at once.
        sender: the trainer's end of the transport of weights; closed with the pool.
    """

    def __init__(
        self,
        starter: Starter[Any],
        num_workers: int,
        order: Open,
        capacity: int,
        sender: Sender,
        limits: Limits,
        event: Event,
    ) -> None:
        self._starter, self._order, self._per_worker = starter, pickle.dumps(order), capacity
        self._sender, self._limits, self._event = sender, limits, event
        self._workers = [Worker(index, limits) for index in range(num_workers)]
        self._pending: OrderedDict[str, list[Request]] = OrderedDict()
        """Requests that no worker has, by prompt, in the order in which they are begun."""
        self._homes: OrderedDict[str, int] = OrderedDict()
        """The worker that has computed a prompt."""
        self._deaths: dict[str, int] = {}
        """Of workers that had a request, by its id."""
        self._first: set[str] = set()
        """Ids of unfinished requests that go before all others."""
        self._done: list[Completion] = []
        self._epoch = 0
        self._parcel: dict[str, Any] | None = None
        self._receipts: dict[int, Receipt] = {}
        """Of the published version, by worker."""
        self._asleep = False
        self._restarts = self._resubmitted = 0
        self._looked = time.monotonic()
        self._attend()

    @property
    def num_workers(self) -> int:
        return len(self._workers)

    @property
    def capacity(self) -> int:
        """See `Fleet`."""
        return self._per_worker * len(self._workers)

    def submit(self, requests: Sequence[Request], *, first: bool = False) -> None:
        """See `Fleet`."""
        for request in requests:
            self._pending.setdefault(_group(request), []).append(request)
            if first:
                self._pending.move_to_end(_group(request), last=False)
                self._first.add(request.request_id)
        self._dispatch()

    def poll(self, seconds: float) -> list[Completion]:
        """See `Fleet`."""
        until = time.monotonic() + seconds
        while True:
            self._attend()
            left = until - time.monotonic()
            if self._done or left <= 0:
                done, self._done = self._done, []
                return done
            self._wait(left)

    def abort(self) -> None:
        """See `Fleet`."""
        self._epoch += 1
        self._pending.clear()
        self._first.clear()
        self._deaths.clear()
        self._done.clear()
        for worker in self._workers:
            worker.assigned.clear()
            worker.send(Abort())

    def publish(
        self,
        version: int,
        tensors: Callable[[], Iterator[tuple[str, Tensor]]],
        folder: Path | None,
        *,
        adapter_only: bool = False,
        alive: Callable[[], None] = idle,
    ) -> list[Receipt]:
        """See `Fleet`. A worker that ends meanwhile is not waited for, if another one holds the version."""
        assert not self._asleep, "weights for engines that have no memory for them"
        is_first = self._parcel is None
        self._parcel = self._sender.send(version, tensors(), adapter_only=adapter_only, folder=folder)
        assert self._parcel["version"] == version, self._parcel
        self._receipts.clear()
        for worker in self._workers:
            if worker.state not in (State.STARTING, State.DEAD):
                self._refit(worker)
        while True:
            self._attend()
            is_asked = any(worker.asked_version is not None for worker in self._workers)
            if not is_asked and len(self._receipts) >= (len(self._workers) if is_first else 1):
                break
            alive()
            self._wait(LOOK_SECONDS)
        self._sender.forget(version)
        return [receipt for _, receipt in sorted(self._receipts.items())]

    def sleep(self, alive: Callable[[], None] = idle) -> None:
        """See `Fleet`."""
        assert not self._asks(), "engines go to sleep with requests in flight"
        self._rest(alive, asleep=True)

    def wake(self, alive: Callable[[], None] = idle) -> None:
        """See `Fleet`."""
        self._rest(alive, asleep=False)

    def facts(self) -> dict[str, float]:
        """See `Fleet`. Of each worker what it said last, at most a second old."""
        found = {
            "restarts": float(self._restarts),
            "resubmitted": float(self._resubmitted),
            "workers": float(sum(worker.state in (State.HEALTHY, State.SUSPECT) for worker in self._workers)),
        }
        for worker in self._workers:
            for name, value in worker.totals().items():
                found[name] = found.get(name, 0.0) + value
        return found

    def close(self) -> None:
        """See `Fleet`."""
        closing = [worker for worker in self._workers if worker.state is State.HEALTHY]
        for worker in closing:  # any other is in the middle of something, or past it
            worker.send(Stop())
        until = time.monotonic() + STOP_SECONDS
        while time.monotonic() < until and (closing := [worker for worker in closing if worker.hear()[1] is None]):
            self._starter.wait([worker.link for worker in closing if worker.link], 0.02)
        for worker in self._workers:
            if worker.link is not None:
                worker.link.kill()
                worker.link = None
        self._starter.close()
        self._sender.close()

    def _wait(self, seconds: float) -> None:
        links = [worker.link for worker in self._workers if worker.link is not None]
        self._starter.wait(links, min(seconds, LOOK_SECONDS, self._limits.heartbeat_seconds / 10))

    def _attend(self) -> None:
        """Hears all workers, restarts those that need it, and gives out what waits."""
        for worker in self._workers:
            messages, ended = worker.hear()
            for message in messages:
                self._obey(worker, message)
            if ended is not None:
                self._lose(worker, "died", ended)
        now = time.monotonic()
        passed, self._looked = now - self._looked, now
        for worker in self._workers:
            if worker.link is not None and (reason := worker.overdue(passed)) is not None:
                worker.words = worker.stacks()
                self._lose(worker, "hung", reason)
            if worker.updating >= self._limits.sync_seconds:
                raise SyncFailed(
                    f"{worker} does not hold version {worker.asked_version} after {self._limits.sync_seconds:g} s, in "
                    f"the phase `{worker.phase}`"
                )
            if worker.state is State.DEAD and time.monotonic() >= worker.due:
                self._start(worker)
        self._dispatch()

    def _start(self, worker: Worker) -> None:
        try:
            worker.begin(self._starter.start(worker.index, self._order))
        except OSError as error:
            self._lose(worker, "died", f"could not be started: {error}")
            return
        if self._asleep:
            worker.send(Sleep(True))

    def _obey(self, worker: Worker, message: Message) -> None:
        if isinstance(message, Opened):
            worker.state = State.STALE
            self._event("rollout_worker_started", index=worker.index, pid=worker.pid, seconds=round(worker.seconds, 3))
            self._refit(worker)
        elif isinstance(message, Done):
            if message.epoch == self._epoch:
                self._finish(worker, message.completions)
        elif isinstance(message, Holds):
            self._check(worker, message.receipt)
        elif isinstance(message, Missed):
            if message.version == worker.asked_version:
                raise SyncFailed(f"{worker} could not take version {message.version}: {message.words}")
        elif isinstance(message, Asleep):
            worker.asleep = message.asleep
            if not message.asleep and worker.state is State.STALE:
                self._refit(worker)
        elif isinstance(message, Broke):
            self._break(worker, message)

    def _finish(self, worker: Worker, completions: Sequence[Completion]) -> None:
        for completion in completions:
            if worker.assigned.pop(completion.request_id, None) is not None:
                self._deaths.pop(completion.request_id, None)
                self._first.discard(completion.request_id)
                self._done.append(completion)
                worker.failures.clear()
                worker.finished_at = time.monotonic()

    def _break(self, worker: Worker, broke: Broke) -> None:
        """Raises what would happen again; anything else is a worker that is about to end."""
        worker.words = broke.words
        if broke.error is None:
            return
        error = pickle.loads(broke.error)
        assert isinstance(error, BurnishError), error
        if isinstance(error, UserError):
            raise error
        raise RunFailed(f"{worker} cannot go on: {error}") from error

    def _refit(self, worker: Worker) -> None:
        """Tells it to take the published weights. Until it says that it holds them it is given nothing."""
        if self._parcel is None or self._asleep:
            return
        worker.state = State.STALE
        worker.asked_version, worker.asked_at, worker.updating = self._parcel["version"], time.monotonic(), 0.0
        worker.send(Update(self._parcel))

    def _check(self, worker: Worker, receipt: Receipt) -> None:
        if self._parcel is None or worker.asked_version is None:
            return
        version, digest = self._parcel["version"], self._parcel["digest"]
        if receipt.version < version:
            return  # it took what was published before, and has more to take
        if (receipt.version, receipt.digest) != (version, digest):
            raise SyncFailed(
                f"{worker} holds version {receipt.version} with digest {receipt.digest}, and what was published is "
                f"version {version} with digest {digest}"
            )
        if worker.is_anew:
            facts = {"version": version, "seconds": round(time.monotonic() - worker.asked_at, 3)}
            self._event("rollout_worker_refitted", index=worker.index, pid=worker.pid, **facts)
        worker.asked_version, worker.updating, worker.state, worker.is_anew = None, 0.0, State.HEALTHY, False
        self._receipts[worker.index] = replace(receipt, worker=f"rollout {worker.index}")

    def _lose(self, worker: Worker, how: str, reason: str) -> None:
        """Takes back what a worker had, and has it started anew.

        One that cannot even be opened, because its machine is gone, is tried for as long as the others finish requests.

        Raises:
            RestartsExhausted: it, or one of its requests, has been through too much.
        """
        was_open = worker.state not in (State.STARTING, State.DEAD)
        words, pid, seconds = worker.last_words(), worker.pid, round(worker.seconds, 3)
        said = words.strip().splitlines()[-1:] if how == "died" and worker.words else []
        failure = f"{worker}: {': '.join([reason, *said])}"
        orphans = list(worker.assigned.values())
        worker.end(failure)
        self._receipts.pop(worker.index, None)
        self._restarts += 1
        self._resubmitted += len(orphans)
        self._event(f"rollout_worker_{how}", index=worker.index, pid=pid, seconds=seconds, reason=failure, words=words)
        most = self._limits.max_restarts
        if len(worker.failures) > most:
            if was_open or not any(other.finished_at > worker.failing_since for other in self._workers):
                raise RestartsExhausted(tuple(worker.failures), words, "a completed request")
            worker.failures.clear()
        for request in reversed(orphans):
            count = self._deaths[request.request_id] = self._deaths.get(request.request_id, 0) + 1
            if count > most:
                ends = f"request {request.request_id} was in flight at {count} ends of workers, the last: {failure}"
                raise RestartsExhausted((ends,), words, "a completed request")
            group = _group(request)
            self._homes.pop(group, None)
            self._pending.setdefault(group, []).insert(0, request)
            self._pending.move_to_end(group, last=False)  # it was asked for before all that wait

    def _dispatch(self) -> None:
        """Gives out what waits, in order, as far as there is room.

        What goes first is spread by itself, beside what the workers have: as many prompts at once as there are workers
        reach all of them. Such a prompt has one turn, so its worker is not remembered.
        """
        healthy = {worker.index: worker for worker in self._workers if worker.state is State.HEALTHY}
        if not healthy or self._asleep:
            return
        is_full = {True: False, False: False}
        for group, requests in list(self._pending.items()):
            first = requests[0].request_id in self._first
            worker = healthy.get(self._homes.get(group, -1))
            if worker is None:
                if is_full[first]:
                    continue
                loads = {index: self._load(each, first=first) for index, each in healthy.items()}
                worker = healthy[min(loads, key=loads.__getitem__)]
                is_full[first] = loads[worker.index] >= self._per_worker
                if is_full[first]:
                    continue
            del self._pending[group]
            if not first:
                self._homes[group] = worker.index
                self._homes.move_to_end(group)
                if len(self._homes) > NUM_HOMES:
                    self._homes.popitem(last=False)
            worker.assigned |= {request.request_id: request for request in requests}
            worker.send(Submit(self._epoch, requests))

    def _load(self, worker: Worker, *, first: bool) -> int:
        """Requests that count against its capacity."""
        return len(self._first & worker.assigned.keys()) if first else len(worker.assigned)

    def _rest(self, alive: Callable[[], None], *, asleep: bool) -> None:
        """Waits for those that have an engine; one that is loading is told when it has loaded."""
        self._asleep = asleep
        for worker in self._workers:
            worker.send(Sleep(asleep))
        limit = self._limits.sync_seconds + self._limits.heartbeat_seconds
        since = time.monotonic()
        while True:
            self._attend()
            late = [
                worker
                for worker in self._workers
                if worker.asleep != asleep and worker.state not in (State.STARTING, State.DEAD)
            ]
            if not late:
                return
            if time.monotonic() - since > limit:
                verb = "sleep" if asleep else "wake"
                raise RunFailed(f"{late[0]} does not {verb} in {limit:g} s; its phase is `{late[0].phase}`")
            alive()
            self._wait(LOOK_SECONDS)

    def _asks(self) -> bool:
        return bool(self._pending) or any(worker.assigned for worker in self._workers)


def _group(request: Request) -> str:
    return request.request_id.partition(".")[0]
