"""Reinforcement learning on several ranks with engines beside them: the run of one rank, and one end for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import rl_helpers, tiny_run
from tests.e2e.test_many_ranks import exported
from tests.e2e_helpers import Lab, column, events

SCRIPT = [[100, 101, 2], [102, 103, 104, 105, 106, 2], [107, 2], [280, 290, 300, 310, 2]]
TWO = {"type": "processes", "num_workers": 2}


def changes(lab: Lab, engine: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    """Four steps of four prompts, sampled by one engine in a process of its own that needs no torch."""
    rollout = {
        "group_size": 4,
        "sampling": {"max_new_tokens": 8},
        "engine": {"type": "fake", "tokens": SCRIPT} | (engine or {}),
        "workers": {"type": "processes", "num_workers": 1, "max_restarts": 0},
        "alignment": {"action": "warn"},
    }
    rewards = [{"type": "function", "path": "tests.rl_bad_helpers:mean_id"}]
    blocks = rl_helpers.changes(lab.folder / "prompts.jsonl", rollout=rollout, rewards=rewards)
    return blocks | {"num_steps": 4, "checkpoint": {"save_every": 100, "keep": 2}} | top


def end_of_the_engines(lab: Lab, name: str, **top: Any) -> Path:
    """A run of two ranks whose engines are given up after two steps."""
    breaking = {"type": "tests.rl_bad_helpers:Breaking", "at_version": 2}
    run_dir = lab.train(name, expect=1, **changes(lab, breaking, launch=TWO, **top))
    output = (lab.folder / "output.log").read_text()
    assert "given up after 1 failures without a completed request" in output and "fell off the bus" in output
    (failed,) = events(run_dir, "failed")
    assert (failed["step"], failed["checkpoint"]) == (2, "checkpoint-2")
    return run_dir


@pytest.mark.long
@pytest.mark.parametrize("determinism", ["fixed", "elastic"])
def test_two_ranks_train_what_one_does_end_together_and_one_goes_on_for_them(lab: Lab, determinism: str):
    alone = lab.train(f"{determinism}-alone", **changes(lab, determinism=determinism))
    run_dir = end_of_the_engines(lab, f"{determinism}-two", determinism=determinism)
    lab.train(f"{determinism}-two", **changes(lab, determinism=determinism))  # the engine is mended, on one rank
    assert [event["ranks"] for kind in ("begun", "resumed") for event in events(run_dir, kind)] == [2, 1]
    assert [group["index"] for group in rl_helpers.groups(run_dir)] == list(range(16))
    assert min(column(alone, "grad_norm")) > 0.01
    for found, expected in zip(tiny_run.losses(run_dir), tiny_run.losses(alone), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    if determinism == "elastic":
        assert rl_helpers.groups(run_dir) == rl_helpers.groups(alone)
        assert tiny_run.losses(run_dir) == tiny_run.losses(alone)
        assert exported(run_dir) == exported(alone)


@pytest.mark.long
def test_an_adapter_travels_alone_and_the_engine_computes_with_it(lab: Lab):
    rollout = {
        "group_size": 2,
        "sampling": {"max_new_tokens": 6},
        "workers": {"type": "processes", "num_workers": 1},
        "alignment": {"every": 1, "action": "refuse", "max_difference": 1e-5},
    }
    blocks = rl_helpers.changes(lab.folder / "prompts.jsonl", rollout=rollout)
    fast = {"optimizer": {"type": "adamw", "learning_rate": 0.05}, "schedule": {"type": "constant"}}
    model = {"model": {"adapter": {"type": "lora", "r": 2}}}
    run_dir = lab.train("adapter", **blocks | fast | model | {"num_steps": 3})
    # Two layers of seven matrices, with r = 2 rows and columns of float32 each: 2 (in + out) numbers.
    shapes = [(48, 48), (48, 24), (48, 24), (48, 48), (48, 96), (48, 96), (96, 48)]
    adapter = 2 * sum(2 * (rows + columns) for rows, columns in shapes) * 4
    whole = (lab.model_path / "model.safetensors").stat().st_size
    assert set(column(run_dir, "sync_bytes")) == {adapter} and adapter < whole / 10
    assert max(column(run_dir, "probe/max_difference")) < 1e-5 and len(column(run_dir, "probe/max_difference")) == 3
    assert min(column(run_dir, "grad_norm")) > 0 and max(column(run_dir, "mismatch/max_difference")) < 1e-5
