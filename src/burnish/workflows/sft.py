"""Supervised fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import model_validator

from burnish.component import OneOf
from burnish.losses.base import Loss
from burnish.workflows.base import Workflow

if TYPE_CHECKING:
    from burnish.workflows.base import Run

LOSSES = OneOf("burnish.losses", default="nll")
OUTPUTS = frozenset({"weighted_nll", "logprobs", "entropy"})
"""What a loss may need here; the others need a second model or another head."""


class SFT(Workflow):
    """Minimises a loss over the trained tokens of packed rows, and watches it on held-out rows."""

    type: Literal["sft"] = "sft"
    loss: Annotated[Loss, LOSSES] = LOSSES.field(Loss)
    """What is minimised; by default the negative log-likelihood of the trained tokens."""

    @model_validator(mode="after")
    def _feasible(self) -> Self:
        missing = sorted(self.loss.needs - OUTPUTS)
        if missing:
            raise ValueError(f"the loss {self.loss.type} needs {', '.join(missing)}, which this workflow does not make")
        return self

    def run(self, run: Run) -> None:
        """Gradient descent on the loss, one global batch a step."""
        run.evaluate_at_start(self.loss)
        for learning_rate, blocks in run.batches():
            metrics = run.policy.forward_backward(blocks, self.loss)
            update = run.policy.optim_step(learning_rate)
            run.record(metrics, update, blocks, self.loss)
            run.evaluate_if_due(self.loss)
