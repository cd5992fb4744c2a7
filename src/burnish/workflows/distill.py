"""Distillation: a student learns a teacher's distribution over the tokens of the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import model_validator

from burnish.component import OneOf
from burnish.losses.base import Loss
from burnish.policy.second import Teacher
from burnish.workflows.base import Workflow, minimise

if TYPE_CHECKING:
    from burnish.policy.second import SecondModel
    from burnish.workflows.run import Run

LOSSES = OneOf("burnish.losses", default="kd")


class Distill(Workflow):
    """Brings the student's distribution at each trained token to the teacher's."""

    type: Literal["distill"] = "distill"
    loss: Annotated[Loss, LOSSES] = LOSSES.field(Loss)
    """What is minimised: a divergence from the teacher, or a sum of it and the likelihood of the data."""
    teacher: Teacher
    """Who is learned from, during the run or from a cache."""

    @model_validator(mode="after")
    def _answered(self) -> Self:
        asked = self.loss.asks | self.loss.needs & {"full_kl"}
        if not asked:
            raise ValueError(f"the loss {self.loss.type} asks nothing of the teacher: use `workflow: {{type: sft}}`")
        unanswered = asked - self.teacher.provides()
        if "full_kl" in unanswered:
            raise ValueError(
                f"the loss {self.loss.type} compares whole distributions, and a cache keeps the likeliest "
                f"{self.teacher.top_k} tokens: use `loss: {{type: topk_kd}}`, or `teacher.path` without `cache`"
            )
        if "teacher_hidden" in unanswered:
            raise ValueError(
                f"the loss {self.loss.type} compares hidden states, and a cache keeps none: use `teacher.path` without "
                f"`cache`"
            )
        if unanswered:
            raise ValueError(
                f"the loss {self.loss.type} asks {', '.join(sorted(unanswered))}, which a teacher does not say: use "
                f"the workflow that the loss is made for"
            )
        return self

    def losses(self) -> list[Loss]:
        return [self.loss]

    def second(self) -> SecondModel:
        return self.teacher

    def run(self, run: Run) -> None:
        """Gradient descent on the divergence, one global batch a step."""
        minimise(run, self.loss)
