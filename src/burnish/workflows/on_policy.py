"""What workflows share that train on what the policy itself says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from burnish.component import OneOf
from burnish.rewards.base import Reward
from burnish.rollout.config import RolloutConfig
from burnish.rollouts import SamplingParams
from burnish.workflows.base import Workflow

if TYPE_CHECKING:
    from collections.abc import Iterable

    from burnish.rollouts import RolloutGroup
    from burnish.types import Block, Metric
    from burnish.workflows.rollout_rows import Batch
    from burnish.workflows.rollout_stream import RolloutStream
    from burnish.workflows.run import Run

REWARDS = OneOf("burnish.rewards")


class OnPolicy(Workflow):
    """A workflow whose rows are prompts: `data.train` is asked about, and `global_batch_size` counts prompts a step."""

    rollout: RolloutConfig = RolloutConfig()
    """How completions are sampled."""
    rewards: list[Annotated[Reward, REWARDS]] = []
    """What completions are worth: a weighted sum, each term logged by its name."""
    solved_at: float | None = None
    """A rollout counts as solved from this reward on, and `pass@k` is logged; absent: it is not."""
    eval_sampling: SamplingParams | None = None
    """How the prompts of `data.eval` are answered; absent: as rollouts are."""
    eval_group_size: Annotated[int, Ge(1)] = 1
    """Answers to each of them."""

    @property
    def trains_on_draws(self) -> bool:
        """Whether the loss reads the probability of what was drawn, which must be that of the distribution it was drawn
        from."""
        return False

    @property
    def compares_draws(self) -> bool:
        """Whether one answer to a prompt is measured by another, so that they must not be the same."""
        return True

    def stream(self, run: Run) -> RolloutStream:
        """The run's rollouts, which its launch has opened for an on-policy workflow."""
        from burnish.workflows.rollout_stream import RolloutStream

        assert isinstance(run.stream, RolloutStream)
        return run.stream

    def evaluate(self, rollouts: RolloutStream, _: Iterable[Block] = ()) -> Mapping[str, Metric]:
        """Rewards and lengths of answers to the prompts of `data.eval`; nothing where a signal asks to stop."""
        from burnish.rollout.metrics import group_metrics

        sampling = self.eval_sampling or self.rollout.sampling
        groups = rollouts.sample(lambda collector: [*collector.held_out()], sampling, self.eval_group_size, "eval")
        if groups is None:
            return {}
        return {name: (mean, 1.0) for name, mean in group_metrics(groups, solved_at=self.solved_at).items()}

    def note(self, run: Run, batch: Batch) -> None:
        """What a step's rollouts were, and how long it waited for whom, into its metrics and its file for reading."""
        from burnish.rollout.metrics import group_metrics, lag_metrics

        rollouts = self.stream(run)
        run.note(group_metrics(batch.groups, solved_at=self.solved_at))
        run.note(lag_metrics(batch.groups, batch.version))
        run.note(rollouts.work())
        if rollouts.probe.last is not None:
            run.note({f"probe/{name}": value for name, value in rollouts.probe.last.as_metrics().items()})
            rollouts.probe.last = None
        said = [self._readable(rollouts, group, batch) for group in batch.groups] if run.policy.mesh.rank == 0 else []
        run.journal.rollouts(run.step + 1, said)

    def _readable(self, rollouts: RolloutStream, group: RolloutGroup, batch: Batch) -> dict[str, Any]:
        """A group for `burnish data RUN --rollouts`."""
        assert rollouts.collector is not None
        text, prompt = rollouts.collector.dialogue.text, group.prompt
        each = [
            {
                "text": text(rollout.token_ids[rollout.num_prompt :]),
                "reward": rollout.reward,
                "terms": rollout.terms,
                "advantage": batch.advantage_of(rollout),
                "tokens": rollout.num_sampled,
                "finish_reason": rollout.finish_reason,
                "lag": batch.version - rollout.oldest_version,
                "turns": rollout.num_turns,
            }
            for rollout in group.rollouts
        ]
        return {"index": prompt.index, "where": prompt.where, "prompt": text(prompt.token_ids), "rollouts": each}
