"""The rollouts of a run as every rank sees them: what stands where other workflows have packed rows of their data.

Rank 0 collects; the others hear from it at least every second, so that a long wait is no silence and a signal to stop
does not wait. With a lag of 0 sampling and training take turns, and the main thread moves the collector; above, a
thread moves it beside training. Must not know which workflow trains on the groups.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from burnish.errors import RefusedElsewhere, RunFailed, UserError
from burnish.model.wire import outgoing
from burnish.rollout.metrics import prompt_metrics, work_metrics
from burnish.rollouts import RolloutGroup
from burnish.workflows.rollout_rows import Batch, Layout

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.mesh import Mesh
    from burnish.policy.policy import Policy
    from burnish.rollout.collector import Collector, Kind
    from burnish.rollout.engine import Receipt
    from burnish.rollouts import Prompt, SamplingParams
    from burnish.workflows.rollout_probe import Probe

    Attempt = Callable[[Collector], Any]
    """Gives JSON, or None: not yet."""

HEAR_SECONDS = 1.0
"""Between two words of rank 0 to the other ranks, while all wait."""

LOOK_SECONDS = 0.005
"""Between two looks of the thread beside training at engines and rewards, in which nobody holds the lock. With waits
inside it, a step of 0.8 s spent 0.15 s on four waits of the main thread for the lock."""


class RolloutStream:
    """Groups of rollouts, step by step, with the verbs that `Run` asks of a stream.

    Args:
        collector: on rank 0; None elsewhere.
        layout: of packed rows.
        probe: asks after a sync whether engines and policy agree.
        extent: of the prompts, JSON; what a resumed run must find again.
        require: raises ResumeError where they are of another one.
        num_prompts: of the whole run; None: it has no end of its own.
        beside: sample while the policy trains.
        adapter_only: whether the adapter is all that travels to the engines.
        folder: configuration and tokenizer of the model, for engines that read Hugging Face folders.
        stop_requested: name of the signal that asked this rank to stop, if one did.
    """

    def __init__(
        self,
        policy: Policy,
        collector: Collector | None,
        *,
        layout: Layout,
        probe: Probe,
        require: Callable[[Any], None],
        extent: Any,
        num_prompts: int | None,
        beside: bool,
        adapter_only: bool,
        folder: Path | None,
        stop_requested: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.policy, self.mesh, self.collector = policy, policy.mesh, collector
        self.layout, self.probe, self._stop_requested = layout, probe, stop_requested
        self._require, self.extent, self.num_prompts, self._beside = require, extent, num_prompts, beside
        self._adapter_only, self._folder = adapter_only, folder
        self.version = -1
        """Of the policy that the engines hold."""
        self.receipts: list[Receipt] = []
        """Of the last publication, on rank 0."""
        self.wait_seconds = self.publish_seconds = 0.0
        self.over = False
        self._frontier = 0
        self._facts: dict[str, float] = {}
        self._asked = time.perf_counter()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None

    def publish(self, version: int) -> None:
        """Brings the policy's weights to the engines; every rank takes part. Nothing where they hold `version`.

        Raises:
            SyncFailed: an engine does not hold what was sent, or does not compute with it.
        """
        if version == self.version:
            return
        started, first = time.perf_counter(), self.version < 0
        outbox = _Outbox(self.policy, self._adapter_only)
        if self.collector is None:
            outbox.drain()
            while (said := self.mesh.from_first(None)) != "sent":
                if said == "failed":
                    raise RunFailed("rank 0 could not bring the weights to the engines, and says why")
        else:
            said = "failed"
            try:
                with self._held() as collector:
                    self.receipts = collector.fleet.publish(
                        version, outbox.tensors, self._folder, adapter_only=self._adapter_only, alive=outbox.alive
                    )
                    collector.published(version)
                said = "sent"
            finally:
                outbox.drain()
                self.mesh.from_first(said)
        self.version = version
        self.publish_seconds = time.perf_counter() - started
        self.probe.after_sync(self, first=first)

    def done_with(self) -> None:
        """What was taken last is done with, and no update was made of it."""
        if self.collector is not None:
            with self._held() as collector:
                collector.buffer.published()

    def take(self, num_groups: int) -> list[RolloutGroup]:
        """The groups of the next step, the same on every rank; fewer or none at the end of the run, none where a signal
        asks to stop.

        Raises:
            UserError: a prompt cannot be asked; on ranks other than 0, RefusedElsewhere.
            RunFailed: engines or rewards do not answer.
        """

        def attempt(collector: Collector) -> Any:
            found = collector.take()
            if found is None:
                return None
            frontier = collector.buffer.frontier
            return [[group.to_json() for group in found], frontier, frontier == self.num_prompts]

        started = time.perf_counter()
        if self.collector is not None and self._beside and self._thread is None:
            self._thread = threading.Thread(target=self._pump, name="burnish-rollouts", daemon=True)
            self._thread.start()
        found = self._heard(attempt)
        self.wait_seconds += time.perf_counter() - started
        if found is None:
            return []
        groups, self._frontier, self.over = found
        return [RolloutGroup.from_json(each) for each in groups]

    def packed(self, groups: Sequence[RolloutGroup], num_minibatches: int = 1) -> Batch:
        """A step's groups as rows of this rank."""
        return Batch(groups, self.layout, self.mesh, version=self.version, num_minibatches=num_minibatches)

    def sample(
        self, prompts: Callable[[Collector], Sequence[Prompt]], params: SamplingParams, size: int, kind: Kind
    ) -> list[RolloutGroup] | None:
        """Rollouts that are not trained, on every rank; None where a signal asks to stop first.

        Args:
            prompts: says on rank 0 which prompts.
            size: rollouts of each.
        """
        begun: list[str] = []

        def attempt(collector: Collector) -> Any:
            if not begun:
                begun.extend(["", *collector.begin(prompts(collector), params, size, kind)])
            found = collector.finished(begun[1:])
            return None if found is None else [group.to_json() for group in found]

        found = self._heard(attempt)
        if found is None and self.collector is not None:
            with self._held() as collector:
                collector.forget(begun[1:])
        return None if found is None else [RolloutGroup.from_json(each) for each in found]

    def state(self) -> dict[str, Any]:
        """JSON; rank 0's is that of the run."""
        if self.collector is None:
            return {}
        with self._held() as collector:
            return {"extent": self.extent, "over": self.over, **collector.state()}

    def together(self, mesh: Mesh, mine: dict[str, Any]) -> dict[str, Any]:
        """Rank 0's state is that of the run, and rank 0 writes it."""
        return mine

    def load(self, state: dict[str, Any]) -> None:
        """Goes on behind what `state` had consumed. Raises ResumeError: the prompts are not those it was of."""
        self._require(state["extent"])
        self._frontier, self.over, self.version = state["frontier"], state["over"], -1
        self._facts = prompt_metrics(state["counts"])
        if self.collector is not None:
            with self._held() as collector:
                collector.load(state)

    def progress(self) -> float | None:
        """Share of all prompts that was trained or left out; None where the run has no last prompt."""
        return None if self.num_prompts is None else min(1.0, self._frontier / self.num_prompts)

    def ledger_state(self) -> dict[str, Any]:
        """What became of the prompts so far, as rank 0 knows it."""
        return {} if self.collector is None else {"prompts": dict(self.collector.buffer.counts)}

    def ledger(self, states: Sequence[dict[str, Any]] | None = None) -> dict[str, Any]:
        """For `ledger.json`."""
        return (states or [self.ledger_state()])[0]

    def work(self) -> dict[str, float]:
        """What engines and rewards did since the last call, and how long syncs took."""
        now, facts = time.perf_counter(), self.facts()
        found = work_metrics(self._facts, facts, now - self._asked)
        self._facts, self._asked = facts, now
        sync = self.mesh.from_first([self.publish_seconds, sum(receipt.num_bytes for receipt in self.receipts)])
        return found | {"sync_seconds": sync[0], "sync_bytes": sync[1]}

    def facts(self) -> dict[str, float]:
        """Counters of engines, rewards and prompts, the same on every rank."""
        found: dict[str, float] = {}
        if self.collector is not None:
            with self._held() as collector:
                found = collector.facts()
        return self.mesh.from_first(found)

    @contextmanager
    def sleeping(self) -> Iterator[None]:
        """Engines that share the policy's device give it their memory meanwhile, and get it back."""
        if self._beside:
            yield
            return
        if self.collector is not None:
            self.collector.interrupt()  # of more prompts than a step needed, some may be unfinished
            self.collector.fleet.sleep(self.mesh.alive)
        try:
            yield
        finally:
            if self.mesh.device.type == "cuda":  # the allocator would keep what the update does not need any more
                torch.cuda.empty_cache()
            if self.collector is not None:
                self.collector.fleet.wake(self.mesh.alive)

    def close(self) -> None:
        """Ends the thread; engines and rewards are their opener's."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=60.0)

    def _heard(self, attempt: Attempt) -> Any:
        """What `attempt` gives on rank 0, on every rank; None where a signal asked rank 0 to stop before it gave
        something. Raises on every rank what was raised on rank 0, or that it was."""
        while True:
            found, failure = self._attempted(attempt)
            fate = "" if failure is None else "refused" if isinstance(failure, (UserError, OSError)) else "failed"
            if not fate and found is None and self._stop_requested() is not None:
                fate = "stop"
            found, fate = self.mesh.from_first([found, fate])
            if failure is not None:
                raise failure
            if fate == "refused":
                raise RefusedElsewhere(0)
            if fate == "failed":
                raise RunFailed("rank 0 could not go on with its rollouts, and says why")
            if found is not None or fate == "stop":
                return found

    def _attempted(self, attempt: Attempt) -> tuple[Any, Exception | None]:
        """What `attempt` gives within a second on rank 0, or why it never will."""
        if self.collector is None:
            return None, None
        deadline = time.monotonic() + HEAR_SECONDS
        try:
            while True:
                with self._held() as collector:
                    found = attempt(collector)
                    if found is None and self._failure is not None:
                        raise self._failure
                    if found is None and self._thread is None:
                        collector.pump(HEAR_SECONDS)
                if found is not None or time.monotonic() > deadline:
                    return found, None
                if self._thread is not None:
                    time.sleep(LOOK_SECONDS)
        except Exception as error:  # the others wait for a word of this rank: they are told, then it is raised
            return None, error

    @contextmanager
    def _held(self) -> Iterator[Collector]:
        assert self.collector is not None
        with self._lock:
            yield self.collector

    def _pump(self) -> None:
        while not self._stop.is_set():
            try:
                with self._held() as collector:
                    collector.pump(0.0)
            except (
                Exception
            ) as error:  # raised by whoever waits for what will not come; a thread has nobody to raise to
                self._failure = error
                return
            time.sleep(LOOK_SECONDS)


class _Outbox:
    """The policy's tensors on their way out, which every rank must iterate to the end, and signs of life behind it."""

    def __init__(self, policy: Policy, adapter_only: bool) -> None:
        self._mesh = policy.mesh
        self._tensors = outgoing(policy.model, adapter_only=adapter_only)
        self._is_drained, self._said = False, time.monotonic()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All of them, on rank 0."""
        yield from self._tensors
        self._is_drained = True

    def drain(self) -> None:
        """Iterates what is left, where other ranks take part in it."""
        if self._mesh.world_size > 1:
            for _ in self._tensors:
                pass

    def alive(self) -> None:
        """On rank 0: a sign of life of all ranks, a second after the last."""
        self._mesh.alive()
        if self._is_drained and time.monotonic() - self._said > HEAR_SECONDS:
            self._said = time.monotonic()
            self._mesh.from_first("wait")
