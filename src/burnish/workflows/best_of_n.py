"""Rejection sampling: of several answers to each prompt the best are kept, as rows to train on. Nothing is trained."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import model_validator

from burnish.component import unfit
from burnish.workflows.on_policy import OnPolicy

if TYPE_CHECKING:
    from burnish.rollouts import Rollout, RolloutGroup
    from burnish.workflows.run import Run


class BestOfN(OnPolicy):
    """Writes `selected/step-*.jsonl` into the run folder: rows for `workflow: {type: sft}` or `{type: preference}`.

    `data: {train: [{type: jsonl, path: "runs/mine/selected/*.jsonl"}]}` reads them. With supervised fine-tuning on what
    it wrote this is RAFT (Dong et al., arXiv:2304.06767). Stopped and started again, it writes each prompt once.
    """

    type: Literal["best_of_n"] = "best_of_n"
    keep: Literal["best", "pairs"] = "best"
    """`best`: the best answer of each prompt, as `prompt` and `completion`; `pairs`: the best and the worst, as
    `chosen` and `rejected`, where their rewards differ."""
    min_reward: float | None = None
    """An answer of less is never the best; absent: any may be."""

    @property
    def exports(self) -> bool:
        return False

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if self.rollout.group_size == 1:
            raise unfit("the best of one answer is that answer", "raise it", "rollout", "group_size")
        if not self.rewards and not self.rollout.environment.is_interactive:
            raise unfit("nothing says which answer is best", "add `rewards: [{type: ...}]`", "rewards")
        return self

    def run(self, run: Run) -> None:
        """One batch of prompts a step, all under the same weights."""
        rollouts = self.stream(run)
        rollouts.publish(0)
        run.evaluate_at_start(partial(self.evaluate, rollouts))
        for _, groups in run.batches():
            batch = rollouts.packed(groups)
            rows = [row for group in groups if (row := self.selected(group)) is not None]
            run.journal.selected(run.step + 1, rows)
            self.note(run, batch)
            run.note({"selected": float(len(rows))})
            rollouts.done_with()

    def selected(self, group: RolloutGroup) -> dict[str, Any] | None:
        """The row that a group becomes; None: it becomes none. Of equal answers the first."""
        finished = [rollout for rollout in group.rollouts if _is_whole(rollout)]
        if not finished:
            return None
        best, worst = max(finished, key=_reward), min(finished, key=_reward)
        if self.min_reward is not None and best.reward < self.min_reward:
            return None
        row = {**group.prompt.columns, "prompt": group.prompt.asked}
        if self.keep == "best":
            return row | {"completion": best.said, "reward": best.reward}
        if best.reward == worst.reward:
            return None
        margin = {"reward_chosen": best.reward, "reward_rejected": worst.reward}
        return row | {"chosen": best.said, "rejected": worst.said} | margin


def _is_whole(rollout: Rollout) -> bool:
    """Whether a model may learn from it to stop where it does: it ended by itself, says something, and was judged."""
    if not rollout.said:  # no turn, or no item in it
        return False
    said = rollout.said[-1] if isinstance(rollout.said, list) else rollout.said
    text = said["content"] if isinstance(said, dict) else said
    return rollout.finish_reason == "stop" and bool(text.strip()) and not rollout.failed


def _reward(rollout: Rollout) -> float:
    return rollout.reward
