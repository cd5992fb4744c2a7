"""Supervised fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from burnish.component import OneOf
from burnish.losses.base import Loss
from burnish.workflows.base import Workflow, minimise

if TYPE_CHECKING:
    from burnish.workflows.run import Run

LOSSES = OneOf("burnish.losses", default="nll")


class SFT(Workflow):
    """Minimises a loss over the trained tokens of packed rows, and watches it on held-out rows."""

    type: Literal["sft"] = "sft"
    loss: Annotated[Loss, LOSSES] = LOSSES.field(Loss)
    """What is minimised; by default the negative log-likelihood of the trained tokens."""
    evaluate: Annotated[Loss, LOSSES] | None = None
    """What is measured on held-out rows; absent: the loss. `{type: ranking}` for items of member histories."""

    def losses(self) -> list[Loss]:
        return [self.loss] if self.evaluate is None else [self.loss, self.evaluate]

    def run(self, run: Run) -> None:
        """Gradient descent on the loss, one global batch a step."""
        minimise(run, self.loss, self.evaluate)
