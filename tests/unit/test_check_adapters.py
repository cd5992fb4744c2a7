"""`burnish check` applies the adapter to a model without weights: it counts what trains, and refuses what cannot."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from burnish import cli
from burnish.errors import UserError
from burnish.model.load import load_config
from burnish.model.plan import ONE_RANK, Work, plan
from burnish.recipe import Recipe, load_recipe
from tests import tiny_run

# Hidden 48, inner 96, keys and values 24 wide, two layers, 320 tokens, embedding and head tied.
LAYER = {"q_proj": (48, 48), "k_proj": (48, 24), "v_proj": (48, 24), "o_proj": (48, 48)}
LAYER |= {"gate_proj": (48, 96), "up_proj": (48, 96), "down_proj": (96, 48)}
ALL_LINEAR = 2 * 4 * sum(inputs + outputs for inputs, outputs in LAYER.values())
COUNTS: dict[str, tuple[dict[str, Any], int, bool]] = {
    "all-linear": ({}, ALL_LINEAR, False),
    "dora": ({"use_dora": True}, ALL_LINEAR + 2 * sum(outputs for _, outputs in LAYER.values()), False),
    "regex": ({"target_modules": r".*1\.self_attn\.k_proj"}, 4 * (48 + 24), False),
    "embedding and head": ({"target_modules": ["embed_tokens", "lm_head"]}, 2 * 4 * (320 + 48), True),
    "saved": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, 2 * 4 * (48 + 48) + 320 * 48, True),
}


@pytest.mark.parametrize("case", COUNTS)
def test_what_trains_is_counted(case: str, tiny_model: Path, tiny_train: Path, tmp_path: Path) -> None:
    fields, trained, trains_head = COUNTS[case]
    blocks = tiny_run.recipe(tiny_model, tiny_train, tmp_path / "run")
    blocks["model"]["adapter"] = {"type": "lora", "r": 4, **fields}
    model = Recipe.model_validate(blocks).model
    found = plan(model, load_config(model), ONE_RANK, Work(1, 1, 16))
    assert (found.num_parameters, found.num_trained, found.trains_head) == (57_072 + trained, trained, trains_head)


def test_targets_are_refused_at_check_time(
    tiny_model: Path, tiny_train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = tiny_run.recipe(tiny_model, tiny_train, tmp_path / "run")
    blocks["model"]["adapter"] = {"type": "lora", "target_modules": ["q_porj"]}
    file = tiny_run.write_recipe(tmp_path / "r.yaml", blocks)
    assert cli.main(["check", str(file), "--json"]) != 0
    [refused] = [f for f in json.loads(capsys.readouterr().out)["findings"] if f["verdict"] == "refused"]
    assert refused["text"] == "model.adapter.target_modules: no linear layer or embedding is called 'q_porj'"
    assert "q_proj" in refused["cure"]


NEW_TOKENS = {"type": "model", "add_tokens": {"tokens": ["<a>", "<b>", "<c>"]}}


def test_rows_of_new_tokens_are_counted_and_the_frozen_ones_are_not(
    tiny_model: Path, tiny_train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = tiny_run.recipe(tiny_model, tiny_train, tmp_path / "run")
    blocks["data"]["tokenizer"] = NEW_TOKENS
    assert cli.main(["check", str(tiny_run.write_recipe(tmp_path / "r.yaml", blocks)), "--json"]) == 0
    texts = [f["text"] for f in json.loads(capsys.readouterr().out)["findings"]]
    # 57,072 and three rows of 48 in the matrix, and once more as what trains; of the matrix, 323 rows are frozen.
    assert f"{57_072 + 2 * 3 * 48:,} parameters, {57_072 - 320 * 48 + 3 * 48:,} of them trained" in texts


def test_an_adapter_on_a_head_with_new_rows_is_refused_at_check_time(
    tiny_model: Path, tiny_train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = tiny_run.recipe(tiny_model, tiny_train, tmp_path / "run")
    blocks["model"]["adapter"] = {"type": "lora", "r": 4, "target_modules": ["q_proj", "lm_head"]}
    blocks["data"]["tokenizer"] = NEW_TOKENS
    assert cli.main(["check", str(tiny_run.write_recipe(tmp_path / "r.yaml", blocks)), "--json"]) == 2
    [refused] = [f for f in json.loads(capsys.readouterr().out)["findings"] if f["verdict"] == "refused"]
    assert refused["text"].startswith("data.tokenizer.add_tokens.train: the adapter changes embedding or head")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="it is installed")
def test_four_bits_without_bitsandbytes_are_refused_at_check_time(
    tiny_model: Path, tiny_train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = tiny_run.recipe(tiny_model, tiny_train, tmp_path / "run")
    blocks["model"]["adapter"] = {"type": "qlora", "r": 4}
    file = tiny_run.write_recipe(tmp_path / "r.yaml", blocks)
    assert cli.main(["check", str(file), "--json"]) != 0
    [refused] = [f for f in json.loads(capsys.readouterr().out)["findings"] if f["verdict"] == "refused"]
    assert refused["text"] == "model.adapter: four-bit weights need bitsandbytes"
    assert 'pip install "burnish[qlora]"' in refused["cure"]


def test_dora_is_not_compiled(tiny_model: Path, tiny_train: Path, tmp_path: Path) -> None:
    blocks = tiny_run.recipe(tiny_model, tiny_train, tmp_path / "run")
    blocks["model"] |= {"adapter": {"type": "lora", "use_dora": True}, "compile": {}}
    with pytest.raises(UserError, match="model.compile: PEFT's DoRA .* cannot trace"):
        load_recipe(tiny_run.write_recipe(tmp_path / "r.yaml", blocks))
