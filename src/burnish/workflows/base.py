"""What a workflow is, and the run it is handed.

A workflow is a flat loop over the verbs of a policy. It is handed a `Run`: policy, stream, cadences, and where to
write. It builds none of them and never sees where it runs, so the same loop serves one process and a cluster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Protocol

from burnish.component import Component
from burnish.errors import RunFailed, Stopped, UserError

if TYPE_CHECKING:
    from burnish.data.stream import Stream
    from burnish.losses.base import Loss
    from burnish.policy.checkpoint import Checkpointer
    from burnish.policy.policy import Policy, Update
    from burnish.policy.second import SecondModel
    from burnish.policy.throughput import Throughput
    from burnish.schedules.base import Schedule
    from burnish.types import Block, Metric

    Measure = Callable[[Iterable[Block]], Mapping[str, Metric]]
    """What is asked of the held-out rows: one pass over them."""

MAX_BAD_STEPS = 3
"""Non-finite steps in a row that end a run: one is a bad row, three are a diverged model."""


class Workflow(Component):
    """The objective and its loop, chosen by `workflow: {type: ...}`."""

    def run(self, run: Run) -> None:
        """Trains to the end, or raises: Stopped when paused, RunFailed, or a UserError from the data."""
        raise AssertionError(f"{type(self).__name__} has no loop")

    def losses(self) -> list[Loss]:
        """Every loss of the workflow: they say what rows, heads and second models the run needs."""
        return []

    def second(self) -> SecondModel | None:
        """The frozen model that the losses compare with, if they do."""
        return None


def minimise(run: Run, loss: Loss, evaluation: Loss | None = None) -> None:
    """Gradient descent on `loss`, one global batch a step; held-out rows are measured by `evaluation`, or by `loss`."""
    measure = partial(run.policy.evaluate, loss=evaluation or loss, at_once=run.blocks_per_step)
    run.evaluate_at_start(measure)
    for learning_rate, blocks in run.batches():
        metrics = run.policy.forward_backward(blocks, loss)
        update = run.policy.optim_step(learning_rate)
        run.record(metrics, update, blocks, loss)
        run.evaluate_if_due(measure)


def means(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """What a person reads. Of what did not occur nothing is said: the reward of chosen answers in a step without any is
    not 0. The loss of such a step is."""
    return {name: total / (count or 1.0) for name, (total, count) in metrics.items() if count or name == "loss"}


class Journal(Protocol):
    """Where a run writes what a person reads: metrics, events, the token ledger, the screen."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def event(self, kind: str, **facts: Any) -> None: ...

    def ledger(self, totals: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class Cadence:
    """When things happen, in steps. `num_steps` is None where `num_epochs` says the length of the run."""

    num_steps: int | None
    eval_every: int | None
    save_every: int
    stop_after: int | None


@dataclass(slots=True)
class Run:
    """A training run, resumed or fresh, as a workflow sees it."""

    policy: Policy
    stream: Stream
    held_out: Callable[[], Iterable[Block]] | None
    """One pass over the evaluation rows; None where the recipe has none."""
    schedule: Schedule
    learning_rate: float
    """Peak; the schedule multiplies it."""
    blocks_per_step: int
    """Packed rows of this rank in a step."""
    cadence: Cadence
    checkpointer: Checkpointer
    journal: Journal
    throughput: Throughput
    peak_flops: float
    """FLOP/s of this device that `mfu` and `hfu` are shares of."""
    stop_requested: Callable[[], str | None] = lambda: None
    """Name of the signal that asked the run to stop, if one did."""
    step: int = 0
    """Finished steps."""
    bad_steps: int = 0
    """Skipped steps in a row."""
    _record: dict[str, float] = field(default_factory=dict)
    _started: float = 0.0

    def batches(self) -> Iterator[tuple[float, list[Block]]]:
        """(learning rate, packed rows) of each step still to do.

        Everything that must not happen inside a step happens between two: the step's line is written, background saves
        are looked at, a checkpoint is begun, a signal is heeded. Leaves a checkpoint behind however it ends, but for
        RunFailed, where the last good one stays the newest.
        """
        while self.cadence.num_steps is None or self.step < self.cadence.num_steps:
            self._stop_if_asked()
            progress = self.progress()
            self._started, waited = time.perf_counter(), self.stream.wait_seconds
            try:
                blocks = self.stream.take(self.blocks_per_step)
            except (UserError, OSError) as error:
                # A row that cannot be used, or a remote file that fails, is reached only now: what was learned before
                # it is kept. Before the first step that is nothing, and a checkpoint would only hold the person to a
                # recipe that has to change.
                if self.step > 0 and self.save(wait=True):
                    self.journal.event(
                        "refused", step=self.step, reason=str(error), checkpoint=f"checkpoint-{self.step}"
                    )
                raise
            if not blocks:
                break
            learning_rate = self.learning_rate * self.schedule.factor(self.step, progress, self.cadence.num_steps)
            self._record = {
                "learning_rate": learning_rate,
                "data_wait_seconds": self.stream.wait_seconds - waited,
            }
            yield learning_rate, blocks
            self.step += 1
            self._finish_step()
        self.save(wait=True)

    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]: of its steps, or of its samples where epochs say its length."""
        if self.cadence.num_steps is not None:
            return self.step / self.cadence.num_steps
        share = self.stream.progress()
        assert share is not None, "a run without num_steps knows its number of samples"
        return share

    def record(self, metrics: Mapping[str, Metric], update: Update, blocks: list[Block], loss: Loss) -> None:
        """Notes a step's metrics; three skipped steps in a row end the run.

        Raises:
            RunFailed: the third step in a row whose loss or gradient was not finite.
        """
        seconds = time.perf_counter() - self._started
        trained = sum(int(block.loss_mask.sum()) for block in blocks)
        held = sum(int((block.document_ids >= 0).sum()) for block in blocks)
        self._record |= means(metrics)
        self._record |= {
            "grad_norm": update.grad_norm,
            "tokens": trained,
            "tokens_per_second": trained / seconds,
            "fill": held / sum(block.num_tokens for block in blocks),
            "step_seconds": seconds,
        }
        flops = self.throughput.flops(blocks, loss)
        if flops is not None:
            self._record |= {"mfu": flops[0] / seconds / self.peak_flops, "hfu": flops[1] / seconds / self.peak_flops}
        self.bad_steps = self.bad_steps + 1 if update.skipped else 0
        if update.skipped:
            samples = [sample for block in blocks for sample in block.sample_ids]
            self.journal.event("step_skipped", step=self.step + 1, reason=update.reason, samples=samples)
        if self.bad_steps == MAX_BAD_STEPS:
            raise RunFailed(
                f"step {self.step + 1}: {update.reason}, the third step in a row; the rows are in events.jsonl under "
                f"step_skipped, and the newest checkpoint is from before them\n"
                f"  cure: lower optimizer.learning_rate, or look at those rows"
            )

    def evaluate_at_start(self, measure: Measure) -> None:
        """Measures the held-out rows before the first step of a fresh run, written as step 0."""
        if self.held_out is not None and self.step == 0:
            self._evaluate(self.held_out(), measure)
            if self._record:
                self.journal.log(0, self._record)

    def evaluate_if_due(self, measure: Measure) -> None:
        """Measures the held-out rows after the step at hand: every `eval_every` steps, and after the last."""
        if self.held_out is None:
            return
        step, every = self.step + 1, self.cadence.eval_every
        if step == self.cadence.num_steps or self.stream.over or (every is not None and step % every == 0):
            self._evaluate(self.held_out(), measure)

    def _evaluate(self, blocks: Iterable[Block], measure: Measure) -> None:
        # A signal does not wait for the held-out set: the step ends without its evaluation, then the run stops.
        metrics = measure(takewhile(lambda _: self.stop_requested() is None, blocks))
        if self.stop_requested() is not None:
            return
        self._record |= {f"eval_{name}": mean for name, mean in means(metrics).items()}

    def save(self, *, wait: bool = False) -> bool:
        """Begins a checkpoint of this moment; with `wait`, returns when it is on disk, or False where it was refused:
        the reason is in the events then, and the checkpoint before is as it was."""
        tensors, policy = self.policy.state()
        state = {"step": self.step, "bad_steps": self.bad_steps, "stream": self.stream.state(), "policy": policy}
        self.checkpointer.save(self.step, tensors, state, wait=wait)
        return self._report_saves() if wait else True

    def load(self, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Becomes the run that was saved."""
        self.policy.load(tensors, state["policy"])
        self.stream.load(state["stream"])
        self.step, self.bad_steps = state["step"], state["bad_steps"]

    def _finish_step(self) -> None:
        self.journal.log(self.step, self._record)
        self.journal.ledger(self.stream.ledger())
        self._report_saves()
        # Not amid skipped steps: a run that ends by them goes on from before them.
        is_due = self.step % self.cadence.save_every == 0 and self.step != self.cadence.num_steps
        if is_due and self.bad_steps == 0:
            self.save()

    def _stop_if_asked(self) -> None:
        reason, stop_after = self.stop_requested(), self.cadence.stop_after
        if reason is None and stop_after is not None and self.step >= stop_after:
            reason = f"stop_after={stop_after}"
        if reason is not None:
            saved = "checkpoint saved" if self.save(wait=True) else "checkpoint NOT saved, see above"
            self.journal.event("stopped", step=self.step, reason=reason)
            how = "the same command" if reason.startswith("SIG") else "the same command without stop_after"
            raise Stopped(f"stopped after step {self.step} ({reason}), {saved}; {how} goes on")

    def _report_saves(self) -> bool:
        """Whether the last of the saves that finished is on the disk."""
        outcomes = self.checkpointer.poll()
        for outcome in outcomes:
            self.journal.event(outcome.kind, **outcome.facts())
        return not outcomes or outcomes[-1].kind == "checkpoint_saved"
