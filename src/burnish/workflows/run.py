"""The run that a workflow is handed: what happens between two steps, and what is written of each.

Every rank runs the same loop in step with the others. What one rank alone knows (a signal, a row that it cannot use) is
gathered before anybody acts on it, or the others would wait in a collective that never comes. It must not know which
objective it serves, nor how the ranks were started.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from burnish.data.packing.layout import empty_block
from burnish.errors import RefusedElsewhere, RunFailed, Stopped, UserError
from burnish.policy.checkpoint import Saved
from burnish.policy.policy import in_chunks
from burnish.workflows.anomaly import OK, Anomalies, Anomaly, Verdict

if TYPE_CHECKING:
    from burnish.losses.base import Loss
    from burnish.policy.checkpoint import Checkpointer
    from burnish.policy.policy import Policy, Update
    from burnish.policy.throughput import Throughput
    from burnish.schedules.base import Schedule
    from burnish.types import Block, Metric
    from burnish.workflows.feed import Feed
    from burnish.workflows.stragglers import Lookout

    Measure = Callable[[Iterable[Block]], Mapping[str, Metric]]
    """What is asked of the held-out rows: one pass over them."""


TIMED_STEPS = 10
"""Steps of a process before its first save where the interval is chosen by their time."""


def means(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """What a person reads. Of what did not occur nothing is said: the reward of chosen answers in a step without any is
    not 0. The loss of such a step is."""
    return {name: total / (count or 1.0) for name, (total, count) in metrics.items() if count or name == "loss"}


class Journal(Protocol):
    """Where a run writes what a person reads: metrics, events, the token ledger, the screen."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def event(self, kind: str, **facts: Any) -> None: ...

    def ledger(self, totals: Mapping[str, Any]) -> None: ...

    def rollouts(self, step: int, groups: Sequence[Mapping[str, Any]]) -> None:
        """What the policy said in a step, for reading."""

    def selected(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows that a step has made, durably."""

    def rollbacks(self, listed: Mapping[str, Any]) -> None:
        """Keeps the list of steps that are passed over; durable on return."""

    def cut(self, step: int) -> None:
        """Metrics of steps after this one are written again."""


@dataclass(frozen=True, slots=True)
class Cadence:
    """When things happen, in steps. `num_steps` is None where `num_epochs` says the length of the run."""

    num_steps: int | None
    eval_every: int | None
    save_every: int | None
    """None: to be chosen once a save and `TIMED_STEPS` steps have been timed."""
    stop_after: int | None


@dataclass(slots=True)
class Run:
    """A training run, resumed or fresh, as a workflow sees it."""

    policy: Policy
    stream: Feed
    held_out: Callable[[], Iterable[Block]] | None
    """One pass over the evaluation rows; None where the recipe has none."""
    schedule: Schedule
    learning_rate: float
    """Peak; the schedule multiplies it."""
    blocks_per_step: int
    """Packed rows of this rank in a step; of rollouts, groups of all ranks."""
    cadence: Cadence
    checkpointer: Checkpointer
    journal: Journal
    throughput: Throughput
    peak_flops: float
    """FLOP/s of this device that `mfu` and `hfu` are shares of; of a CPU, at least what the quickest step needed."""
    stop_requested: Callable[[], str | None] = lambda: None
    """Name of the signal that asked the run to stop, if one did."""
    beat: Callable[[str], None] = lambda _: None
    """A sign of life for whoever supervises this rank, with what it is about to do."""
    anomalies: Anomalies = field(default_factory=lambda: Anomalies(Anomaly()))
    """Judges every step's loss and gradient."""
    choose_interval: Callable[[float, float], int] | None = None
    """Steps between saves, by the seconds of a save and of a step; asked once, where `cadence.save_every` is None."""
    lookout: Lookout | None = None
    """Looks for ranks that hold the others up."""
    step: int = 0
    """Finished steps."""
    _verdict: Verdict = OK
    _timed: list[float] = field(default_factory=list)
    _record: dict[str, float] = field(default_factory=dict)
    _started: float = 0.0

    def batches(self) -> Iterator[tuple[float, list[Any]]]:
        """(learning rate, what the stream gives) of each step still to do.

        Everything that must not happen inside a step happens between two: the step's line is written, background saves
        are looked at, a checkpoint is begun, a signal is heeded. Leaves a checkpoint behind however it ends, but for
        RunFailed, where the last good one stays the newest.
        """
        while self.cadence.num_steps is None or self.step < self.cadence.num_steps:
            self._stop_if_asked()
            progress = self.progress()
            self.beat(f"step {self.step + 1}")
            self._started, waited = time.perf_counter(), self.stream.wait_seconds
            blocks = self._take()
            if not blocks:
                self._stop_if_asked()  # a stream that has to wait gives nothing where a signal asks to stop
                break
            passed_over = self.anomalies.pass_over(self.step + 1)
            learning_rate = self.learning_rate * self.schedule.factor(self.step, progress, self.cadence.num_steps)
            self._record = {
                "learning_rate": learning_rate,
                "data_wait_seconds": self.stream.wait_seconds - waited,
            }
            if passed_over is not None:
                self._note_rows("passed_over", passed_over, blocks)
            else:
                yield learning_rate, blocks
                if self._verdict.action == "rollback":
                    self._go_back()
                    continue
            self.step += 1
            self._finish_step()
        self.save(wait=True)

    def note(self, metrics: Mapping[str, float]) -> None:
        """More to say of the step at hand than its loss does."""
        self._record |= metrics

    def _take(self) -> list[Any]:
        """This rank's rows of a step, or none at the end.

        A row that cannot be used, a remote file that fails, or engines that are given up, are met only now, and by one
        rank: all end with it, and what was learned before is kept. Before the first step that is nothing, and a
        checkpoint would only hold the person to a recipe that has to change.
        """
        before, blocks, refusal = self.stream.state(), [], None
        try:
            blocks = self.stream.take(self.blocks_per_step)
        except (UserError, OSError, RunFailed) as error:
            refusal = error
        found = self._first(None if refusal is None else str(refusal))
        if found is None:
            return blocks
        rank, reason = found
        if self.step > 0 and self.save(wait=True, stream=before):
            kind = "failed" if isinstance(refusal, RunFailed) else "refused"
            self.journal.event(kind, step=self.step, reason=reason, checkpoint=f"checkpoint-{self.step}")
        raise refusal or RefusedElsewhere(rank)

    def _first(self, mine: str | None) -> tuple[int, str] | None:
        """(rank, what it says) of the first rank that says something; the same answer on every rank."""
        said = enumerate(self.policy.mesh.gather(mine))
        return next(((rank, text) for rank, text in said if text is not None), None)

    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]: of its steps, or of its samples where epochs say its length."""
        if self.cadence.num_steps is not None:
            return self.step / self.cadence.num_steps
        share = self.stream.progress()
        assert share is not None, "a run without num_steps knows its number of samples"
        return share

    def judge(self, loss: float, grad_norm: float) -> str:
        """Why the step at hand must move nothing, by its mean loss and the gradient's norm; empty: it may."""
        self._verdict = self.anomalies.judge(self.step + 1, loss, grad_norm)
        return self._verdict.reason

    def record(self, metrics: Mapping[str, Metric], update: Update, blocks: list[Block], loss: Loss) -> None:
        """Notes a step's metrics, and what was found wrong with it.

        Raises:
            RunFailed: the run's `anomaly` ends it here: for one, the third step in a row that was not finite.
        """
        seconds, mesh = time.perf_counter() - self._started, self.policy.mesh
        flops = self.throughput.flops(blocks, loss)
        trained, held, slots, useful, executed = mesh.sum_scalars(
            [
                sum(int(block.loss_mask.sum()) for block in blocks),
                sum(int((block.document_ids >= 0).sum()) for block in blocks),
                sum(block.num_tokens for block in blocks),
                *(flops or (0.0, 0.0)),
            ]
        )
        self._record |= means(metrics)
        self._record |= {
            "grad_norm": update.grad_norm,
            "tokens": int(trained),
            "tokens_per_second": trained / seconds,
            "fill": held / slots,
            "step_seconds": seconds,
        }
        if flops is not None:
            device_seconds = seconds * mesh.world_size
            if mesh.device.type == "cpu":  # no step outdoes its device: the peak was measured amid other work
                self.peak_flops = max(self.peak_flops, executed / device_seconds)
            limit = device_seconds * self.peak_flops
            self._record |= {"mfu": useful / limit, "hfu": executed / limit}
        if update.skipped:
            self._note_rows("step_skipped", update.reason, blocks)
        if self._verdict.action == "stop":
            raise RunFailed(
                f"step {self.step + 1}: {update.reason}; the rows are in events.jsonl under step_skipped, and the "
                f"newest checkpoint is from before them\n"
                f"  cure: lower optimizer.learning_rate, or look at those rows"
            )

    def _note_rows(self, kind: str, reason: str, blocks: list[Any]) -> None:
        """An event about the step at hand that names its rows."""
        mesh = self.policy.mesh
        held_by = mesh.gather([sample for block in blocks for sample in block.sample_ids])[:: mesh.peers]
        samples = [sample for samples in held_by for sample in samples]
        self.journal.event(kind, step=self.step + 1, reason=reason, samples=samples)

    def _go_back(self) -> None:
        """Becomes the newest sound checkpoint from before the step at hand, whose rows are passed over from now on.

        The list of such rows is kept first: a run that is killed meanwhile passes over them too.
        """
        bad, self._verdict = self.step + 1, OK
        self.journal.rollbacks(self.anomalies.listed())
        self.checkpointer.wait()
        self._report_saves()
        if not self.restore(at_most=bad - 1 - self.anomalies.config.steps_before):
            raise self._nothing_sound()
        self.journal.cut(self.step)
        self.journal.event("rolled_back", step=bad, reason=self.anomalies.rolled_back[bad], to=self.step)

    def restore(self, *, at_most: int | None = None) -> bool:
        """Goes on from the newest intact and sound checkpoint, of at most so many steps; False: there is none.

        Raises:
            RunFailed: there are some, and all are from behind rows that a rollback passes over.
        """
        found = False
        while (loaded := self.checkpointer.load_latest(self.policy.wanted, at_most=at_most)) is not None:
            for reason in loaded.rejected:
                self.journal.event("checkpoint_rejected", reason=reason)
            if self.anomalies.is_sound(loaded.step, loaded.state["anomalies"]):
                self.load(loaded.tensors, loaded.state)
                return True
            found, at_most = True, loaded.step - 1
        if found:
            raise self._nothing_sound()
        return False

    def _nothing_sound(self) -> RunFailed:
        bad, reason = max(self.anomalies.rolled_back.items())
        return RunFailed(
            f"step {bad}: {reason}, and no checkpoint from before its rows is left\n"
            f"  cure: lower checkpoint.save_every or raise checkpoint.keep, and start again in a new run_dir"
        )

    def evaluate_at_start(self, measure: Measure) -> None:
        """Measures the held-out rows before the first step of a fresh run, written as step 0."""
        if self.held_out is not None and self.step == 0:
            self._evaluate(self.held_out(), measure)
            if self._record:
                self.journal.log(0, self._record)

    def evaluate_if_due(self, measure: Measure) -> None:
        """Measures the held-out rows after the step at hand: every `eval_every` steps, and after the last."""
        if self.held_out is None or self._verdict.action == "rollback":
            return
        step, every = self.step + 1, self.cadence.eval_every
        if step == self.cadence.num_steps or self.stream.over or (every is not None and step % every == 0):
            self._evaluate(self.held_out(), measure)

    def _evaluate(self, blocks: Iterable[Block], measure: Measure) -> None:
        # A signal does not wait for the held-out set: the step ends without its evaluation, then the run stops.
        metrics = measure(self._share(blocks))
        if self._first(self.stop_requested()) is not None:
            return
        self._record |= {f"eval_{name}": mean for name, mean in means(metrics).items()}

    def _share(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """This rank's of `blocks`, as many as every other's, until somebody asks to stop."""
        mesh, size = self.policy.mesh, self.policy.micro_batch_size
        for dealt in in_chunks(blocks, size * mesh.sizes.data):
            if self._first(self.stop_requested()) is not None:
                return
            self.beat("evaluation")
            mine = dealt[mesh.data_rank * size : (mesh.data_rank + 1) * size]
            if mesh.world_size > 1:
                first = dealt[0]
                spare = empty_block(first.num_tokens, first.documents.shape[0], first.columns)
                mine += [spare] * (size - len(mine))
            yield from mine

    def save(self, *, wait: bool = False, stream: dict[str, Any] | None = None) -> bool:
        """Begins a checkpoint of this moment; with `wait`, returns when it is on disk, or False where it was refused:
        the reason is in the events then, and the checkpoint before is as it was.

        Args:
            stream: this rank's stream as it is to be resumed; None: as it is now.
        """
        pieces, policy = self.policy.state()
        state = {
            "step": self.step,
            "stream": self.stream.together(self.policy.mesh, stream or self.stream.state()),
            "policy": policy,
            "anomalies": self.anomalies.state(),
        }
        self.beat(f"checkpoint {self.step}")
        self.checkpointer.save(self.step, pieces, state, wait=wait)
        return self._report_saves() if wait else True

    def load(self, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Becomes the run that was saved."""
        self.policy.load(tensors, state["policy"])
        self.stream.load(state["stream"])
        self.anomalies.load(state["anomalies"])
        self.step = state["step"]

    def _finish_step(self) -> None:
        self.journal.log(self.step, self._record)
        mesh = self.policy.mesh
        self.journal.ledger(self.stream.ledger(mesh.gather(self.stream.ledger_state())[:: mesh.peers]))
        for finding in self.lookout.after_step(self._record["data_wait_seconds"]) if self.lookout is not None else []:
            self.journal.event("straggler", step=self.step, said=str(finding), **finding._asdict())
        self._report_saves()
        # Not amid bad steps: a run that ends by them goes on from before them.
        every = self.cadence.save_every
        if every is None:
            self._timed.append(time.perf_counter() - self._started)
        is_due = len(self._timed) % TIMED_STEPS == 0 if every is None else self.step % every == 0
        if is_due and self.step != self.cadence.num_steps and self.anomalies.bad_steps == 0:
            self.save()

    def _stop_if_asked(self) -> None:
        asked, stop_after = self._first(self.stop_requested()), self.cadence.stop_after
        reason = None if asked is None else asked[1]
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
            if isinstance(outcome, Saved) and self.cadence.save_every is None and len(self._timed) > 1:
                step_seconds = self.policy.mesh.from_first(statistics.median(self._timed[1:]))
                assert self.choose_interval is not None, "nobody says how often to save"
                self.cadence = replace(self.cadence, save_every=self.choose_interval(outcome.seconds, step_seconds))
        return not outcomes or outcomes[-1].kind == "checkpoint_saved"
