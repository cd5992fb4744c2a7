"""What a step's rollouts are summed up to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from burnish.rollout.metrics import group_metrics, lag_metrics, pass_at_k, prompt_metrics, work_metrics
from burnish.rollouts import Prompt, Rollout, RolloutGroup


def rollout(reward: float, versions: list[int], *, cut: bool = False, failed: tuple[str, ...] = ()) -> Rollout:
    count = len(versions)
    return Rollout(
        token_ids=[1, 2, *range(3, 3 + count)],
        loss_mask=[False, False] + [True] * count,
        logprobs=[0.0, 0.0] + [-0.5] * count,
        versions=[-1, -1, *versions],
        num_prompt=2,
        said="",
        terms={"exact": reward, "short": 1.0},
        reward=reward,
        finish_reason="length" if cut else "stop",
        failed=failed,
    )


def groups() -> list[RolloutGroup]:
    prompt = Prompt(0, "rows.jsonl:1", [1, 2], "2+2?")
    first = (rollout(1.0, [4, 4, 5]), rollout(0.0, [5], cut=True), rollout(0.0, []), rollout(0.0, [5, 5]))
    second = (rollout(1.0, [5]),) * 3 + (rollout(1.0, [5], failed=("short",)),)
    return [RolloutGroup(prompt, first, 4), RolloutGroup(prompt, second, 5)]


def test_rewards_lengths_and_failures_are_means_over_rollouts():
    metrics = group_metrics(groups())
    assert metrics["reward"] == pytest.approx(5 / 8)
    assert metrics["reward_std"] == pytest.approx(0.75**0.5 / 2 / 2)  # sqrt(3)/4 in the first group, 0 in the second
    assert metrics["uniform_groups"] == 0.5
    assert metrics["completion_tokens"] == pytest.approx(10 / 8)
    assert metrics["completion_tokens_max"] == 3.0
    assert metrics["truncated"] == pytest.approx(1 / 8)
    assert metrics["empty_completions"] == 1.0
    assert metrics["reward/exact"] == pytest.approx(5 / 8)
    assert metrics["reward/short"] == 1.0
    assert metrics["reward_failures/short"] == 1.0
    assert not [name for name in metrics if name.startswith("pass@")]
    assert group_metrics([]) == {}


def test_what_an_environment_did_not_give_is_0():
    (first, _) = groups()
    said, *others = [replace(each, terms={}, failed=("Is it right?",)) for each in first.rollouts]
    said = replace(said, terms={"Is it right?": 1.0, "is_it_right_": 0.5})
    metrics = group_metrics([replace(first, rollouts=(said, *others))])
    assert {name: value for name, value in metrics.items() if "/" in name} == {
        "reward/is_it_right_": 0.25,  # of four rollouts one had it
        "reward/is_it_right__2": 0.125,
        "reward_failures/is_it_right_": 4.0,
    }


def test_prompts_by_what_became_of_them_are_metrics_that_every_tracker_takes():
    counts = {"trained": 3, "sampled again": 2, "prompt longer than 5 tokens": 1, "prompt longer than 5 Tokens": 1}
    assert prompt_metrics(counts) == {
        "prompts_trained": 3.0,
        "prompts_sampled_again": 2.0,
        "prompts_prompt_longer_than_5_tokens": 2.0,
    }


def test_pass_at_k_is_unbiased():
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == 0.5
    assert pass_at_k(4, 3, 2) == 1.0  # no two of four miss all three
    assert pass_at_k(4, 0, 4) == 0.0
    metrics = group_metrics(groups(), solved_at=1.0)
    assert {name: value for name, value in metrics.items() if name.startswith("pass@")} == {
        "pass@1": (0.25 + 1.0) / 2,
        "pass@2": (0.5 + 1.0) / 2,
        "pass@4": 1.0,
    }


def test_the_lag_of_a_rollout_is_that_of_its_oldest_token():
    metrics = lag_metrics(groups(), version=5)
    assert metrics["lag"] == pytest.approx(1 / 7)  # the empty one has none
    assert metrics["lag_max"] == 1.0
    assert metrics["lag_share_0"] == pytest.approx(6 / 7)
    assert metrics["lag_share_1"] == pytest.approx(1 / 7)
    assert lag_metrics([], version=5) == {}


def test_reward_processes_are_busy_for_the_share_of_their_time_that_calls_took():
    before = {"reward_seconds": 1.0, "reward_workers": 2.0, "reward_restarts": 0.0}
    now = {"reward_seconds": 4.0, "reward_workers": 2.0, "reward_restarts": 1.0, "reward_failures": 3.0}
    found = work_metrics(before, now, seconds=2.0)
    assert (found["reward_busy"], found["reward_restarts"]) == (0.75, 1.0)
    assert "reward_failures" not in found  # by name, they are those of the step's groups


def test_engines_work_is_what_their_counters_gained():
    before = {"sampled_tokens": 100.0, "busy_seconds": 2.0, "workers": 2.0, "prompts_trained": 8.0}
    now = {"sampled_tokens": 300.0, "busy_seconds": 5.0, "workers": 2.0, "prompts_trained": 12.0, "restarts": 1.0}
    assert work_metrics(before, now, seconds=2.0) == {
        "rollout_tokens_per_second": 100.0,
        "engine_busy": 0.75,
        "prompts_trained": 4.0,
        "rollout_restarts": 1.0,
    }
