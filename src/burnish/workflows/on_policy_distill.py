"""On-policy distillation: a student learns its teacher's distribution over what the student itself says."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import model_validator

from burnish.component import OneOf, unfit
from burnish.losses.base import Loss
from burnish.losses.kd import KD
from burnish.policy.second import Teacher
from burnish.workflows.on_policy import OnPolicy

if TYPE_CHECKING:
    from burnish.policy.second import SecondModel
    from burnish.workflows.run import Run

LOSSES = OneOf("burnish.losses")


class OnPolicyDistill(OnPolicy):
    """Samples completions from the student, and brings its distribution at each sampled token to the teacher's.

    What the student never says it is never taught, and where it goes wrong it is taught how to go on (Agarwal et al.,
    GKD, arXiv:2306.13649, with a share of on-policy data of 1). Rewards, where there are some, are measured only.
    """

    type: Literal["on_policy_distill"] = "on_policy_distill"
    loss: Annotated[Loss, LOSSES] = KD(kind="reverse")
    """What is minimised over sampled tokens: by default the reverse divergence, which keeps to what the teacher would
    say."""
    teacher: Teacher
    """Who is learned from, during the run."""

    @model_validator(mode="after")
    def _answered(self) -> Self:
        asked = self.loss.asks | self.loss.needs & {"full_kl"}
        if self.teacher.cache is not None:
            reason = "it holds what a teacher said of the data, and what a student will say is not there"
            raise unfit(reason, "name the teacher by its `path`", "teacher", "cache")
        if not asked or asked - self.teacher.provides():
            raise unfit(f"the loss {self.loss.type} is not one that a teacher answers", "`{type: kd}`", "loss")
        return self

    @property
    def compares_draws(self) -> bool:
        return False

    def losses(self) -> list[Loss]:
        return [self.loss]

    def second(self) -> SecondModel:
        return self.teacher

    def run(self, run: Run) -> None:
        """Gradient descent on the divergence, one batch of the student's own completions a step."""
        policy, rollouts = run.policy, self.stream(run)
        rollouts.publish(run.step)
        run.evaluate_at_start(partial(self.evaluate, rollouts))
        for learning_rate, groups in run.batches():
            with rollouts.sleeping():
                batch = rollouts.packed(groups)
                metrics = policy.forward_backward(batch.blocks, self.loss)
                update = policy.optim_step(learning_rate, run.judge)
            self.note(run, batch)
            run.record(metrics, update, batch.blocks, self.loss)
            rollouts.publish(run.step + 1)
            run.evaluate_if_due(partial(self.evaluate, rollouts))
