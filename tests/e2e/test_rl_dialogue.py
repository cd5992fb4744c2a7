"""Rollouts of several turns, and of items, in the one loop: what was sampled trains, what was answered does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from burnish.environments.base import Environment, Observation
from tests import rl_helpers
from tests.e2e_helpers import Lab, column
from tests.events_helpers import chains, write
from tests.zygote import Zygote


class Nagger(Environment):
    """Says `again N` to whatever was said, and gives a tenth for each turn."""

    max_turns: int = 3

    def reset(self, row: dict[str, Any], seed: int) -> Any:
        return 0

    def step(self, state: Any, action: str) -> Observation:
        said = {"role": "user", "content": f"again {state}"}
        return Observation([said], state + 1, rewards={"patience": 0.1})


def test_a_dialogue_trains_on_what_was_sampled_and_reads_what_was_answered(lab: Lab):
    environment = {"type": "tests.e2e.test_rl_dialogue:Nagger"}
    sampling = {"max_new_tokens": 8, "stop": list("aeiourstn ")}
    rollout = {"environment": environment, "sampling": sampling, "group_size": 2}
    recipe = rl_helpers.changes(lab.folder / "prompts.jsonl", rollout=rollout, rewards=[])
    recipe["data"]["max_length"] = 128
    run_dir = lab.train("nagged", **recipe | {"num_steps": 2})
    assert max(column(run_dir, "mismatch_abs")) < 1e-5  # so the policy saw the very tokens that the engine saw
    rollouts = [rollout for group in rl_helpers.groups(run_dir) for rollout in group["rollouts"]]
    assert len(rollouts) == 16 and max(rollout["turns"] for rollout in rollouts) == 3
    for rollout in rollouts:
        answered = rollout["turns"] - 1
        assert all(f"again {number}" in rollout["text"] for number in range(answered))
        assert f"again {answered}" not in rollout["text"]
        assert rollout["terms"].get("patience", 0.0) == pytest.approx(
            0.1 * (rollout["turns"] - (rollout["finish_reason"] == "length"))
        )
        assert rollout["tokens"] <= 8 * rollout["turns"]


def test_a_recommender_is_improved_on_the_value_of_its_lists(zygote: Zygote, tiny_train: Path, tmp_path: Path):
    lab = Lab(zygote, tmp_path, tmp_path, tiny_train)
    events = {"type": "events", "path": write(tmp_path / "t.csv", chains(40, 12, 30)), "future": 2}
    config = {"model_type": "gpt2", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"attn_pdrop": 0.0, "resid_pdrop": 0.3}  # which trained the recommender, and would spoil its ratios here
    terms = [
        {"type": "slate", "name": "relevance", "of": "relevance"},
        {"type": "slate", "name": "diversity", "of": "diversity", "weight": 0.5},
    ]
    run_dir = lab.train(
        "lists",
        workflow={
            "type": "rl",
            "preset": "grpo",
            "rewards": terms,
            "rollout": {"group_size": 8, "sampling": {"max_new_tokens": 4}},
        },
        model={"path": None, "config": config},
        data={
            "train": [{**events, "part": "train"}],
            "eval": [{**events, "part": "test"}],
            "tokenizer": {"type": "vocabulary", "learn_from": [events["path"]]},
            "renderer": {"type": "events", "max_events": 6},
            "max_length": 16,
        },
        global_batch_size=4,
        num_steps=3,
    )
    groups = rl_helpers.groups(run_dir)
    assert sorted({group["index"] for group in groups}) == list(range(12))
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    items = {token for token in tokenizer.get_vocab() if token.startswith("i")}
    for group in groups:
        for rollout in group["rollouts"]:
            said = rollout["text"].split()
            assert set(said) <= items and len(said) <= 4 and rollout["tokens"] == 4
            different = len(set(said))
            assert rollout["terms"]["diversity"] <= different * (different - 1) / (4 * 3) + 1e-9  # of its six pairs
    assert len(column(run_dir, "eval_reward/relevance")) == 2
    assert max(column(run_dir, "mismatch_abs")) < 1e-5
