"""The rollouts of a run as every rank sees them: what stands where other workflows have packed rows of their data.

Rank 0 collects; the others hear from it at least every second, so that a long wait for rollouts is no silence. With a
lag of 0 sampling and training take turns, and the main thread moves the collector; above, a thread moves it beside
training. Must not know which workflow trains on the groups.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish.errors import RefusedElsewhere, UserError
from burnish.model.wire import outgoing
from burnish.rollout.metrics import work_metrics
from burnish.rollouts import RolloutGroup
from burnish.workflows.rollout_rows import Batch, Layout

if TYPE_CHECKING:
    from burnish.policy.policy import Policy
    from burnish.rollout.collector import Collector, Kind
    from burnish.rollout.engine import Receipt
    from burnish.rollouts import Prompt, SamplingParams
    from burnish.workflows.rollout_probe import Probe

HEAR_SECONDS = 1.0
"""Between two words of rank 0 to the other ranks, while all wait for rollouts."""

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
        evaluation: the prompts of `data.eval`, on rank 0.
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
        evaluation: Callable[[], Iterator[Prompt]],
    ) -> None:
        self.policy, self.mesh, self.collector = policy, policy.mesh, collector
        self.layout, self.probe = layout, probe
        self._require, self.extent, self.num_prompts, self._beside = require, extent, num_prompts, beside
        self._adapter_only, self._folder, self._evaluation = adapter_only, folder, evaluation
        self.version = -1
        """Of the policy that the engines hold."""
        self.receipts: list[Receipt] = []
        """Of the last publication, on rank 0."""
        self.wait_seconds = self.publish_seconds = 0.0
        self.over = False
        self._consumed = 0
        self._facts: dict[str, float] = {}
        self._asked = time.perf_counter()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def publish(self, version: int) -> None:
        """Brings the policy's weights to the engines; every rank takes part. Nothing where they hold `version`.

        Raises:
            SyncFailed: an engine does not hold what was sent, or does not compute with it.
        """
        if version == self.version:
            return
        started, first = time.perf_counter(), self.version < 0
        if self.collector is None:
            for _ in outgoing(self.policy.model, adapter_only=self._adapter_only):
                pass  # a sharded tensor is gathered by all ranks
        else:
            with self._held() as collector:
                tensors = partial(outgoing, self.policy.model, adapter_only=self._adapter_only)
                self.receipts = collector.fleet.publish(version, tensors, self._folder, adapter_only=self._adapter_only)
                collector.published(version)
        self.mesh.barrier()
        self.version = version
        self.publish_seconds = time.perf_counter() - started
        self.probe.after_sync(self, first=first)

    def done_with(self) -> None:
        """What was taken last is done with, and no update was made of it."""
        if self.collector is not None:
            with self._held() as collector:
                collector.buffer.published()

    def take(self, num_groups: int) -> list[RolloutGroup]:
        """The groups of the next step, the same on every rank; fewer or none at the end of the run.

        Raises:
            DataError: a prompt cannot be asked.
            RunFailed: engines or rewards do not answer.
        """
        started = time.perf_counter()
        try:
            while True:
                found, failure = self._collected()
                fate = "" if failure is None else "refused" if isinstance(failure, (UserError, OSError)) else "failed"
                told: list[Any] = [None if found is None else [g.to_json() for g in found], fate]
                said = self.mesh.from_first(told)
                if failure is not None:
                    raise failure
                if said[1] == "failed":
                    raise RefusedElsewhere(0)
                if said[1] == "refused":
                    return []  # `Run` then hears of it from rank 0
                if said[0] is not None:
                    groups = found if found is not None else [RolloutGroup.from_json(each) for each in said[0]]
                    self._consumed += len(groups)
                    self.over = len(groups) < num_groups
                    return groups
        finally:
            self.wait_seconds += time.perf_counter() - started

    def packed(
        self, groups: Sequence[RolloutGroup], num_minibatches: int = 1, *, train_truncated: bool = True
    ) -> Batch:
        """A step's groups as rows of this rank."""
        return Batch(
            groups,
            self.layout,
            self.mesh,
            version=self.version,
            num_minibatches=num_minibatches,
            train_truncated=train_truncated,
        )

    def sample(self, prompts: Sequence[Prompt], params: SamplingParams, size: int, kind: Kind) -> list[RolloutGroup]:
        """Rollouts that are not trained, on every rank; see `Collector.sample`."""
        found = []
        if self.collector is not None:
            with self._held() as collector:
                found = [group.to_json() for group in collector.sample(prompts, params, size, kind)]
        return [RolloutGroup.from_json(each) for each in self.mesh.from_first(found)]

    def probe_prompts(self, count: int) -> list[Prompt]:
        """For a probe, on rank 0; none elsewhere."""
        if self.collector is None:
            return []
        with self._held() as collector:
            return collector.probe_prompts(count)

    def evaluation_prompts(self) -> list[Prompt]:
        """Of `data.eval`, on rank 0; none elsewhere."""
        return list(self._evaluation()) if self.collector is not None else []

    def state(self) -> dict[str, Any]:
        """JSON; rank 0's is that of the run."""
        if self.collector is None:
            return {}
        with self._held() as collector:
            return {"extent": self.extent, "consumed": self._consumed, "over": self.over, **collector.state()}

    def merged(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The state of the run from those of all ranks."""
        return states[0]

    def load(self, state: dict[str, Any]) -> None:
        """Goes on behind what `state` had consumed. Raises ResumeError: the prompts are not those it was of."""
        self._require(state["extent"])
        self._consumed, self.over = state["consumed"], state["over"]
        self.version = -1
        if self.collector is not None:
            with self._held() as collector:
                collector.load(state)

    def progress(self) -> float | None:
        """Share of all prompts that was trained; None where the run has no last prompt."""
        return None if self.num_prompts is None else min(1.0, self._consumed / self.num_prompts)

    def ledger_state(self) -> dict[str, Any]:
        """What became of the prompts so far, as rank 0 knows it."""
        return {} if self.collector is None else {"prompts": dict(self.collector.buffer.counts)}

    def ledger(self, states: Sequence[dict[str, Any]] | None = None) -> dict[str, Any]:
        """For `ledger.json`."""
        return (states or [self.ledger_state()])[0]

    def work(self) -> dict[str, float]:
        """What engines did since the last call, and how long syncs took; see `rollout.metrics.work_metrics`."""
        now, facts = time.perf_counter(), self.facts()
        found = work_metrics(self._facts, facts, now - self._asked)
        self._facts, self._asked = facts, now
        sync = self.mesh.from_first([self.publish_seconds, sum(receipt.num_bytes for receipt in self.receipts)])
        return found | {"sync_seconds": sync[0], "sync_bytes": sync[1]}

    def facts(self) -> dict[str, float]:
        """The engines' counters, the same on every rank; see `Fleet.facts`."""
        found: dict[str, float] = {}
        if self.collector is not None:
            with self._held() as collector:
                counts = Counter({f"prompts_{name}": n for name, n in collector.buffer.counts.items()})
                found = {**collector.fleet.facts(), **counts, "environment_failures": collector.environment_failures}
        return self.mesh.from_first(found)

    @contextmanager
    def sleeping(self) -> Iterator[None]:
        """Engines that share the policy's device give it their memory meanwhile."""
        if self.collector is None or self._beside:
            yield
            return
        self.collector.interrupt()  # of more prompts than a step needed, some may be unfinished
        self.collector.fleet.sleep()
        try:
            yield
        finally:
            self.collector.fleet.wake()

    def close(self) -> None:
        """Ends the thread; engines and rewards are their opener's."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=60.0)

    def _collected(self) -> tuple[list[RolloutGroup] | None, BaseException | None]:
        """What rank 0 has for this step within a second, or why it never will."""
        if self.collector is None:
            return None, None
        deadline = time.monotonic() + HEAR_SECONDS
        try:
            if self._beside:
                self._begin_thread()
            while True:
                with self._held() as collector:
                    found = collector.take()
                    if found is None and not self._beside:
                        collector.pump(HEAR_SECONDS)
                if found is not None or time.monotonic() > deadline:
                    return found, None
                if self._beside:
                    time.sleep(LOOK_SECONDS)
        except Exception as error:  # the others wait for a word of this rank: they are told, then it is raised
            return None, error

    @contextmanager
    def _held(self) -> Iterator[Collector]:
        assert self.collector is not None
        with self._lock:
            if self._failure is not None:
                raise self._failure
            yield self.collector

    def _begin_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._pump, name="burnish-rollouts", daemon=True)
            self._thread.start()

    def _pump(self) -> None:
        while not self._stop.is_set():
            try:
                with self._held() as collector:
                    collector.pump(0.0)
            except BaseException as error:  # raised again by whoever asks next; a thread has nobody to raise to
                self._failure = error
                return
            time.sleep(LOOK_SECONDS)
