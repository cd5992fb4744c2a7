"""Reward models, and plain regression and classification: a new head on a language model's body."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from burnish.component import OneOf
from burnish.losses.base import Loss
from burnish.workflows.base import Workflow, minimise

if TYPE_CHECKING:
    from burnish.workflows.run import Run

LOSSES = OneOf("burnish.losses", default="bradley_terry")


class Reward(Workflow):
    """Trains what `model.head` says of a document: a reward, a class, a number, a grade for each step."""

    type: Literal["reward"] = "reward"
    loss: Annotated[Loss, LOSSES] = LOSSES.field(Loss)
    """What is minimised; by default the negative log-likelihood of the chosen answer's being better."""

    def losses(self) -> list[Loss]:
        return [self.loss]

    def run(self, run: Run) -> None:
        """Gradient descent on the loss, one global batch a step."""
        minimise(run, self.loss)
