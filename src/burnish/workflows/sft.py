"""Supervised fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from burnish.component import OneOf
from burnish.losses.base import Loss
from burnish.losses.nll import NLL
from burnish.workflows.base import Workflow

if TYPE_CHECKING:
    from burnish.workflows.base import Run


class SFT(Workflow):
    """Minimises a loss over the trained tokens of packed rows, and watches it on held-out rows."""

    type: Literal["sft"] = "sft"
    loss: Annotated[Loss, OneOf("burnish.losses")] = Field(default_factory=NLL)
    """What is minimised; by default the negative log-likelihood of the trained tokens."""

    def run(self, run: Run) -> None:
        if run.step == 0 and run.held_out is not None:
            run.record_evaluation(run.policy.evaluate(run.held_out(), self.loss))
            run.write_initial()
        for learning_rate, blocks in run.batches():
            metrics = run.policy.forward_backward(blocks, self.loss)
            update = run.policy.optim_step(learning_rate)
            run.record(metrics, update, blocks, self.loss)
            if run.due_evaluation():
                run.record_evaluation(run.policy.evaluate(run.held_out(), self.loss))
