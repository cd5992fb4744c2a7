"""Reinforcement learning on several ranks with engines beside them: the run of one rank, and one end for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import rl_helpers, tiny_run
from tests.e2e.test_many_ranks import Ranks, exported
from tests.e2e_helpers import column, events

SCRIPT = [[100, 101, 2], [102, 103, 104, 105, 106, 2], [107, 2], [280, 290, 300, 310, 2]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    made = Ranks(tmp_path_factory.mktemp("rl-ranks"))
    rl_helpers.write_prompts(made.folder)
    return made


def changes(folder: Path, **top: Any) -> dict[str, Any]:
    """Four steps of four prompts, sampled by one engine in a process of its own that needs no torch."""
    rollout = {
        "group_size": 4,
        "sampling": {"max_new_tokens": 8},
        "engine": {"type": "fake", "tokens": SCRIPT},
        "workers": {"type": "processes", "num_workers": 1},
        "alignment": {"action": "warn"},
    }
    rewards = [{"type": "function", "path": "tests.rl_bad_helpers:mean_id"}]
    blocks = rl_helpers.changes(folder / "prompts.jsonl", rollout=rollout, rewards=rewards)
    return blocks | {"num_steps": 4, "checkpoint": {"save_every": 2, "keep": 2}} | top


@pytest.mark.parametrize("determinism", ["fixed", "elastic"])
def test_two_ranks_train_what_one_does_and_one_goes_on_for_them(ranks: Ranks, determinism: str):
    fields = changes(ranks.folder, determinism=determinism)
    alone = ranks.train(ranks.recipe(f"{determinism}-1", **fields, eval_every=None), 1)
    cut = ranks.recipe(f"{determinism}-2", **fields, eval_every=None)
    ranks.train(cut, 2, "stop_after=2", expect=75)
    two = ranks.train(cut, 1)
    assert [group["index"] for group in rl_helpers.groups(two)] == list(range(16))
    assert rl_helpers.groups(two) == rl_helpers.groups(alone)
    assert [event["ranks"] for event in [*events(two, "begun"), *events(two, "resumed")]] == [2, 1]
    assert min(column(alone, "grad_norm")) > 0.01
    if determinism == "elastic":
        assert tiny_run.losses(two) == tiny_run.losses(alone)
        assert exported(two) == exported(alone)
    for found, expected in zip(tiny_run.losses(two), tiny_run.losses(alone), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
