"""What a workflow is.

A workflow is a flat loop over the verbs of a policy. It is handed a `Run` (`run.py`): policy, stream, cadences, and
where to write. It builds none of them and never sees where it runs, so the same loop serves one process and a cluster.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from burnish.component import Component

if TYPE_CHECKING:
    from burnish.losses.base import Loss
    from burnish.policy.second import SecondModel
    from burnish.workflows.run import Run


class Workflow(Component):
    """The objective and its loop, chosen by `workflow: {type: ...}`."""

    def run(self, run: Run) -> None:
        """Trains to the end, or raises: Stopped when paused, RunFailed, or a UserError from the data."""
        raise AssertionError(f"{type(self).__name__} has no loop")

    @property
    def exports(self) -> bool:
        """Whether the run leaves a model behind."""
        return True

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
        update = run.policy.optim_step(learning_rate, run.judge)
        run.record(metrics, update, blocks, loss)
        run.evaluate_if_due(measure)
