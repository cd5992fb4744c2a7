"""Which answer of a prompt is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from burnish.rewards.exact_match import ExactMatch
from burnish.rollouts import Prompt, Rollout, RolloutGroup
from burnish.workflows.best_of_n import BestOfN


def rollout(said: Any, reward: float, **facts: Any) -> Rollout:
    fixed = Rollout(
        token_ids=[1, 2, 5],
        loss_mask=[False, False, True],
        logprobs=[0.0, 0.0, -0.5],
        versions=[-1, -1, 0],
        num_prompt=2,
        said=said,
        terms={},
        reward=reward,
        finish_reason="stop",
    )
    return replace(fixed, **facts)


def message(content: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": content}]


@pytest.mark.parametrize(
    "worthless",
    [
        rollout([], 2.0, num_turns=0, failed=("environment",)),  # its reset raised: there is no turn
        rollout([], 2.0),  # of items: tokens of features alone, or none
        rollout(["red", ""], 2.0),
        rollout(message("  "), 2.0),
        rollout(message("the red one, for"), 2.0, finish_reason="length"),
        rollout(message("red"), 2.0, failed=("judge",)),
    ],
    ids=lambda each: str(each.said),
)
def test_an_answer_that_is_not_whole_is_never_the_best(worthless: Rollout):
    prompt = Prompt(0, "rows.jsonl:1", [1, 2], "Which?", {"answer": "red"})
    group = RolloutGroup(prompt, (worthless, rollout(message("blue"), 0.0)), 0)
    row = {"answer": "red", "prompt": "Which?", "completion": message("blue"), "reward": 0.0}
    assert BestOfN(rewards=[ExactMatch()]).selected(group) == row
    assert BestOfN(rewards=[ExactMatch()]).selected(RolloutGroup(prompt, (worthless,), 0)) is None
