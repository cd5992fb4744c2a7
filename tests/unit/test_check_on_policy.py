"""`burnish check` of recipes that train on what the policy says: prompts, engines and rewards."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from burnish.commands._on_policy import key_bytes
from burnish.rollout.engines.embedded import Embedded
from burnish.rollout.engines.vllm import VLLM
from tests import tiny_run
from tests.events_helpers import chains, write
from tests.unit.test_check import check, lines

Blocks = dict[str, Any]


@pytest.fixture
def blocks(tiny_model: Path, tmp_path: Path) -> Blocks:
    """Ten prompts; the n-th has n words, and with its template 10 + 2 * n tokens."""
    rows = [{"prompt": "red " * count, "answer": "red"} for count in range(1, 11)]
    train = tiny_run.write_jsonl(tmp_path / "prompts.jsonl", rows)
    workflow = {
        "type": "rl",
        "rewards": [{"type": "exact_match"}],
        "rollout": {"group_size": 4, "sampling": {"max_new_tokens": 16}},
    }
    return tiny_run.recipe(tiny_model, train, tmp_path / "run", workflow=workflow, global_batch_size=5, num_steps=4)


def test_a_good_recipe_is_ready(tmp_path, capsys, blocks):
    report = check(tmp_path, capsys, blocks)
    assert (report["code"], report["ok"]) == (0, True)
    assert not lines(report, "warning")
    stages = list(dict.fromkeys(finding["stage"] for finding in report["findings"]))
    assert stages == [
        "schema", "run", "files", "model", "tokenizer", "prompts", "template", "engine", "batch", "disk", "memory",
        "rewards",
    ]  # fmt: skip
    assert lines(report, "ok", "prompts") == ["data.train.0: all 10 rows, 21.0 tokens each; longest 30 of 64"]
    assert lines(report, "ok", "template") == ["a turn ends with '<|im_end|>'"]
    assert lines(report, "ok", "engine") == ["embedded in the training process, float32, 64 rollouts at once"]
    assert lines(report, "ok", "batch") == [
        "a step: 5 prompts x 4 = 20 rollouts of at most 46 tokens, 1 update",
        "4 steps are 2 epochs; an epoch is 10 prompts, about 2 steps",
    ]
    # Keys and values of two layers, two heads of 12 numbers of 4 bytes; what 20 rollouts of 64 tokens need.
    [engine] = [line for line in lines(report, "ok", "memory") if line.startswith("engine")]
    said = "embedded: 20 rollouts x 64 tokens x 384 bytes of keys and values, no weights of its own"
    assert " ".join(engine.split()) == f"engine 480 KB {said}"
    [asked] = lines(report, "ok", "rewards")
    assert asked.startswith("exact_match 0 for the answer ") and asked.endswith(f"{tmp_path / 'prompts.jsonl'}:1")


def test_engines_beside_training_hold_weights_of_their_own(tmp_path, capsys, blocks):
    blocks["workflow"]["rollout"] |= {"workers": {"type": "processes", "num_workers": 2}}
    report = check(tmp_path, capsys, blocks)
    assert lines(report, "ok", "engine") == ["embedded in 2 processes, float32, 64 rollouts at once"]
    [engine] = [line for line in lines(report, "ok", "memory") if line.startswith("engine")]
    num_bytes = 2 * (20 * 64 * 384 + 57_072 * 4)
    assert engine.split()[1:3] == [f"{num_bytes / 2**20:.0f}", "MB"] and engine.endswith("and weights, 2 times")


def test_what_a_kind_of_engine_takes(tiny_model: Path):
    sizes = {"weights": 1000, "keys": 300, "device": 80_000}
    assert Embedded().device_bytes(**sizes, shares_model=True) == 300
    assert Embedded().device_bytes(**sizes, shares_model=False) == 1300
    assert VLLM(gpu_memory_utilization=0.5).device_bytes(**sizes, shares_model=True) == 40_000
    assert VLLM(kv_cache_gib=2).device_bytes(**sizes, shares_model=True) == 1000 + 2**31
    assert VLLM().device_bytes(weights=1000, keys=300, device=0, shares_model=True) == 1000 + 2**30
    # 32 layers, 8 heads of 128, two bytes each, keys and values.
    wide = LlamaConfig(num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8)
    assert key_bytes(wide, 2) == 2 * 32 * 8 * 128 * 2


def test_prompts_without_room_for_an_answer(tmp_path, capsys, blocks):
    report = check(tmp_path, capsys, blocks, "data.max_length=29")
    assert report["code"] == 2
    # Prompts have 12, 14, ... 30 tokens: of 29, 28 leave room for a token, and 13 for 16.
    [refused] = lines(report, "refused", "prompts")
    assert "prompts.jsonl:10: the prompt has 30 tokens, and 28 leave room for an answer" in refused
    [warned] = lines(report, "warning", "prompts")
    assert warned == ("data.train.0: 8 of 9 prompts leave room for fewer than max_new_tokens: 16; the longest for 1")
    dropping = check(tmp_path, capsys, blocks, "data.max_length=29", "data.over_length=drop")
    assert dropping["code"] == 0
    assert lines(dropping, "ok", "prompts") == [
        "data.train.0: all 10 rows, 20.0 tokens each; longest 28 of 29; 1 dropped: prompt longer than 28 tokens"
    ]
    [nothing] = lines(check(tmp_path, capsys, blocks, "data.max_length=17", "data.over_length=drop",
        "workflow.rollout.sampling.max_new_tokens=2", "-n", "2"), "ok", "prompts")  # fmt: skip
    assert nothing == "data.train.0: the first 2 rows, 13.0 tokens each; longest 14 of 17"


def test_sources_that_cannot_be_asked_again_are_refused(tmp_path, capsys, blocks):
    blocks["data"]["train"][0]["streaming"] = True
    [refused] = lines(check(tmp_path, capsys, blocks), "refused", "prompts")
    assert "streamed source" in refused
    del blocks["data"]["train"][0]["streaming"]
    [refused] = lines(check(tmp_path, capsys, blocks, "data.over_length=truncate"), "refused", "schema")
    assert "data.over_length: a prompt that is cut asks something else" in refused


def test_bad_rows_are_named(tmp_path, capsys, blocks):
    path = Path(blocks["data"]["train"][0]["path"])
    path.write_text(path.read_text() + '{"prompt": 5}\n{"prompt": \n')
    refused = lines(check(tmp_path, capsys, blocks), "refused", "prompts")
    assert len(refused) == 2 and f"{path}:11: " in refused[0] + refused[1] and f"{path}:12: " in refused[0] + refused[1]


def test_a_column_that_a_reward_needs(tmp_path, capsys, blocks):
    blocks["workflow"]["rewards"] = [{"type": "exact_match", "column": "truth", "name": "right"}]
    [refused] = lines(check(tmp_path, capsys, blocks), "refused", "prompts")
    assert refused.startswith("data.train.0: no row has the column `truth`, which right needs; first ")
    path = Path(blocks["data"]["train"][0]["path"])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    tiny_run.write_jsonl(path, [row if i in (3, 7) else row | {"truth": "red"} for i, row in enumerate(rows)])
    [warned] = lines(check(tmp_path, capsys, blocks), "warning", "prompts")
    assert warned == f"data.train.0: 2 rows lack the column `truth`, which right needs; first {path}:4"


def test_a_reward_that_cannot_be_opened_is_refused(tmp_path, capsys, blocks):
    blocks["workflow"]["rewards"] = [{"type": "function", "path": "tests.reward_helpers:nothing"}]
    report = check(tmp_path, capsys, blocks)
    [refused] = lines(report, "refused")
    assert (report["code"], lines(report, "refused", "rewards")) == (2, [refused])
    assert "nothing" in refused


def test_a_reward_that_raises_is_told_with_its_reason(tmp_path, capsys, blocks):
    blocks["workflow"]["rewards"].append({"type": "function", "path": "tests.reward_helpers:never", "name": "late"})
    report = check(tmp_path, capsys, blocks)
    assert report["code"] == 0
    [warned] = lines(report, "warning", "rewards")
    assert warned.startswith(f"late failed for {tmp_path / 'prompts.jsonl'}:1: ") and "not deployed" in warned
    [others] = lines(report, "ok", "rewards")
    assert others.startswith("exact_match 0 for ")


def test_a_reward_that_says_one_number_for_all_completions_is_told(tmp_path, capsys, blocks):
    path = "tests.reward_helpers:one_for_all"
    blocks["workflow"]["rewards"].append({"type": "function", "path": path, "name": "hasty"})
    [warned] = lines(check(tmp_path, capsys, blocks), "warning", "rewards")
    assert warned.startswith("hasty failed for two completions of ") and "1 numbers for 2 completions" in warned


@pytest.mark.parametrize(
    ("role", "verdict", "said"),
    [("user", "ok", "answered, "), ("nobody", "refused", "nobody")],
)
def test_an_environment_is_asked_once(tmp_path, capsys, blocks, role: str, verdict: str, said: str):
    blocks["workflow"]["rollout"]["environment"] = {"type": "tests.reward_helpers:Echo", "role": role}
    report = check(tmp_path, capsys, blocks)
    assert said in lines(report, verdict, "rewards")[0]
    # Three turns of 16, but no more than 64 with the prompt.
    assert "rollouts of at most 64 tokens" in lines(report, "ok", "batch")[0]


def test_an_environment_that_fails_is_told(tmp_path, capsys, blocks):
    blocks["workflow"]["rollout"]["environment"] = {"type": "calculator"}
    report = check(tmp_path, capsys, blocks)
    [warned] = lines(report, "warning", "rewards")
    assert "the environment calculator failed" in warned and "holds no number: 'red'" in warned


def test_tokens_that_end_a_turn(tmp_path, capsys, blocks, tiny_model: Path):
    at = "workflow.rollout.sampling.stop_token_ids"
    [refused] = lines(check(tmp_path, capsys, blocks, f"{at}=[320]"), "refused", "engine")
    assert refused == "token 320 ends a turn, and the policy has 320 embedding rows"
    other = tmp_path / "model"
    other.mkdir()
    for file in tiny_model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text()) | {"eos_token_id": [2, 0]}
    (other / "config.json").write_text(json.dumps(config))
    blocks["model"]["path"] = str(other)
    [warned] = lines(check(tmp_path, capsys, blocks), "warning", "engine")
    assert warned.startswith("the model's configuration ends texts with '<|endoftext|>' too")
    assert not lines(check(tmp_path, capsys, blocks, f"{at}=[0]"), "warning", "engine")


def test_what_an_engine_cannot_sample_from_is_refused(tmp_path, capsys, blocks):
    blocks["workflow"]["rollout"] |= {"engine": {"type": "vllm", "enable_lora": True}, "workers": {"type": "processes"}}
    blocks["model"]["adapter"] = {"type": "lora", "r": 4, "use_dora": True, "lora_dropout": 0.1}
    report = check(tmp_path, capsys, blocks)
    unfit, *others = lines(report, "refused", "engine")
    assert "without DoRA" in unfit and not lines(report, "ok", "engine")
    installed = find_spec("vllm") is not None
    assert others == ["workflow.rollout.engine: vLLM is not installed in this environment"] * (not installed)
    [dropout] = lines(report, "warning", "engine")
    assert dropout.endswith("lora_dropout: 0.1 has no effect")


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_what_is_not_installed_here_may_be_on_a_cluster_s_nodes(tmp_path, capsys, blocks):
    ray = {"workers": {"type": "ray", "address": "auto"}, "sync": {"type": "broadcast"}}
    blocks["workflow"]["rollout"] |= {"engine": {"type": "vllm"}, **ray}
    report = check(tmp_path, capsys, blocks)
    [warned] = lines(report, "warning", "engine")
    assert warned == "vLLM is not installed in this environment; the cluster's nodes must have it"
    assert not lines(report, "refused")


def test_items_end_no_turn(tmp_path, capsys):
    table = write(tmp_path / "events.csv", chains(users=6, length=5, items=9))
    blocks = {
        "workflow": {
            "type": "rl",
            "rewards": [{"type": "slate", "of": "relevance"}],
            "rollout": {"group_size": 2, "sampling": {"max_new_tokens": 2}},
        },
        "model": {
            "config": {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                       "num_attention_heads": 2},
        },
        "data": {
            "train": [{"type": "events", "path": table, "future": 2}],
            "tokenizer": {"type": "vocabulary", "learn_from": [table]},
            "renderer": {"type": "events"},
            "max_length": 16,
        },
        "optimizer": {"type": "adamw", "learning_rate": 1e-3},
        "global_batch_size": 2,
        "num_steps": 2,
        "run_dir": str(tmp_path / "run"),
    }  # fmt: skip
    report = check(tmp_path, capsys, blocks)
    assert not lines(report, "refused")
    assert lines(report, "ok", "template") == ["nothing ends a turn, so that each is 2 tokens long"]
    assert lines(report, "ok", "rewards")[0].startswith("slate ")
    cut = check(tmp_path, capsys, blocks, "workflow.train_truncated=false")
    [refused] = lines(cut, "refused", "template")
    assert refused.endswith("and `train_truncated: false` trains on none of that length")
