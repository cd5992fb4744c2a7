"""Reinforcement learning from the policy's own rollouts."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from annotated_types import Ge, Gt
from pydantic import model_validator

from burnish.advantages.base import Advantage
from burnish.component import Config, OneOf, unfit
from burnish.losses.rl.base import PolicyLoss
from burnish.losses.rl.kl import Estimator, kl_estimate
from burnish.losses.rl.ppo import explained_variance
from burnish.policy.second import Reference
from burnish.workflows.on_policy import OnPolicy
from burnish.workflows.presets import expand
from burnish.workflows.rollout_probe import mismatch

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.losses.base import Loss
    from burnish.policy.policy import Update
    from burnish.policy.second import SecondModel
    from burnish.rollouts import RolloutGroup
    from burnish.types import Metric
    from burnish.workflows.rollout_rows import Batch
    from burnish.workflows.run import Run

ADVANTAGES = OneOf("burnish.advantages", default="group_norm")
LOSSES = OneOf("burnish.losses.rl", default="ppo_clip")


class KLPenalty(Config):
    """The policy's distance from the reference, taken off the reward of each token."""

    coef: Annotated[float, Gt(0)]
    """Reward that a nat costs."""
    estimator: Estimator = "k1"
    """Of the divergence at a sampled token: log p - log q; half its square; or q/p - 1 - log(q/p)
    (Schulman, "Approximating KL divergence", 2020)."""


class RL(OnPolicy):
    """Samples completions, rewards them, and makes the better ones likelier.

    A step: prompts -> rollouts -> rewards -> advantages -> updates of the policy -> its weights to the engines.
    """

    type: Literal["rl"] = "rl"
    preset: str | None = None
    """A published algorithm whose choices are the defaults of the blocks below: grpo, dr_grpo, dapo, gspo, cispo, rloo,
    reinforce_pp, ppo, or aligned. What they are is in the run's `recipe.json`."""
    advantage: Annotated[Advantage, ADVANTAGES] = ADVANTAGES.field(Advantage)
    """How much better a sampled token was than expected."""
    loss: Annotated[PolicyLoss, LOSSES] = LOSSES.field(PolicyLoss)
    """What is minimised over sampled tokens."""
    reference: Reference = Reference()
    """What the policy is held to, by `loss.kl_coef` or `kl_penalty`."""
    kl_penalty: KLPenalty | None = None
    """Takes the distance from the reference off the rewards; absent: nothing is taken off."""
    num_minibatches: Annotated[int, Ge(1)] = 1
    """Updates that the rollouts of a step are split over."""
    num_passes: Annotated[int, Ge(1)] = 1
    """Times that a step's rollouts are gone through (PPO's epochs)."""
    train_truncated: bool = True
    """Train on rollouts that were cut off at their limit; false: they only count in the rewards of their group
    (overlong filtering: Yu et al., DAPO, arXiv:2503.14476, section 3.4)."""

    @model_validator(mode="before")
    @classmethod
    def _expanded(cls, given: Any) -> Any:
        preset = given.get("preset") if isinstance(given, dict) else None
        return expand(preset, given) if isinstance(preset, str) else given  # anything else the schema refuses

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if not self.asks_reference and self.reference != Reference():
            cure = "add `loss.kl_coef` or `kl_penalty`, or remove it"
            raise unfit("nothing is compared with the reference", cure, "reference")
        if self.advantage.needs_values != ("scores" in self.loss.needs):
            reason = (
                "`advantage: {type: gae}` is made of what a value head says, and `loss: {type: ppo}` trains the head"
            )
            raise unfit(reason, "use both, as `preset: ppo` does, or neither", "advantage")
        if self.advantage.needs_group and self.rollout.group_size == 1:
            reason = (
                f"`advantage: {{type: {self.advantage.type}}}` compares the rollouts of a prompt, and with one of each "
                "nothing is ever better"
            )
            cure = "raise it, or use `advantage: {type: reinforce_pp, baseline: none}`"
            raise unfit(reason, cure, "rollout", "group_size")
        if not self.rewards and not self.rollout.environment.is_interactive:
            raise unfit("nothing says what a completion is worth", "add `rewards: [{type: ...}]`", "rewards")
        if self.reference.precompute:
            reason = "it asks about the rows of the data, and what is trained is not there"
            raise unfit(reason, "remove it", "reference", "precompute")
        return self

    @property
    def trains_on_draws(self) -> bool:
        return True

    @property
    def asks_reference(self) -> bool:
        """Whether anything is compared with the reference."""
        return self.kl_penalty is not None or "ref_logprobs" in self.loss.asks

    @property
    def num_updates(self) -> int:
        """Of the policy in a step."""
        return self.num_minibatches * self.num_passes

    def losses(self) -> list[Loss]:
        return [self.loss]

    def second(self) -> SecondModel | None:
        return self.reference if self.asks_reference else None

    def run(self, run: Run) -> None:
        """The whole algorithm."""
        rollouts = self.stream(run)
        rollouts.publish(run.step)
        run.evaluate_at_start(partial(self.evaluate, rollouts))
        for learning_rate, groups in run.batches():
            with rollouts.sleeping():
                batch = self.batch(run, groups)
                metrics, update = self.updates(run, batch, learning_rate)
            self.note(run, batch)
            run.record(metrics, update, batch.blocks, self.loss)
            rollouts.publish(run.step + 1)
            run.evaluate_if_due(partial(self.evaluate, rollouts))

    def batch(self, run: Run, groups: list[RolloutGroup]) -> Batch:
        """A step's rollouts as this rank's rows, with the columns that the loss reads."""
        policy, rollouts = run.policy, self.stream(run)
        batch = rollouts.packed(groups, self.num_minibatches)
        loss, penalties, values = self.loss, None, None
        if rollouts.probe.is_due():
            run.note({f"mismatch/{name}": value for name, value in mismatch(rollouts, batch).as_metrics().items()})
        if self.num_updates > 1 and loss.old_logprobs == "policy":
            batch.write_rows("old_logprobs", policy.logprobs(batch.blocks, trained_only=True))
        if self.asks_reference:
            batch.annotate(policy, "ref_logprobs")
        if self.kl_penalty is not None:
            divergence = self.divergence(batch)
            penalties = self.kl_penalty.coef * divergence
            run.note({"reference_kl": float(divergence.mean()) if batch.num_tokens else 0.0})
        if self.advantage.needs_values:
            columns = policy.read(batch.blocks, loss, loss.values)
            batch.write_rows("old_values", columns)
            values = batch.read(columns)
        advantages, returns = self.advantage(batch.scored(penalties, values))
        batch.write("advantages", advantages)
        if returns is not None:
            batch.write("returns", returns)
        if not self.train_truncated:
            batch.leave_out_truncated()
        return batch

    def divergence(self, batch: Batch) -> Tensor:
        """float64 [A]: of the policy that sampled from the reference, at each sampled token."""
        assert self.kl_penalty is not None
        logprobs, ref = batch.read_column("rollout_logprobs"), batch.read_column("ref_logprobs")
        return kl_estimate(logprobs - ref, self.kl_penalty.estimator)

    def updates(self, run: Run, batch: Batch, learning_rate: float) -> tuple[dict[str, Metric], Update]:
        """One for each minibatch of each pass; metrics over all of them, and the last update, or the first that was
        refused: those after it are not made."""
        from burnish.policy.policy import Update

        sums: dict[str, Metric] = {}
        update = Update(0.0)
        for number, blocks in [*enumerate(batch.minibatches)] * self.num_passes:
            if not batch.num_trained(number):
                continue  # the optimizer's momentum alone would move the policy
            for name, (total, count) in run.policy.forward_backward(blocks, self.loss).items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = before[0] + total, before[1] + count
            update = run.policy.optim_step(learning_rate, run.judge)
            if update.skipped:
                break
        if "returns_squared" in sums:
            sums["explained_variance"] = explained_variance(sums), 1.0
        return sums, update
