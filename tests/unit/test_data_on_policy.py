"""`burnish data` where training is on what the policy says: prompts of a recipe, rollouts of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from burnish.cli import main
from tests import tiny_run


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three prompts in file order, the second too long; one of eval data."""
    folder = tmp_path_factory.mktemp("data-on-policy")
    tiny_run.write_tokenizer(folder)
    rows = [{"prompt": "red?", "answer": "red"}, {"prompt": "red " * 40}, {"prompt": "dog?", "of": ["a", 1]}]
    blocks = {
        "workflow": {
            "type": "rl",
            "rewards": [{"type": "exact_match"}],
            "rollout": {"sampling": {"max_new_tokens": 8}},
        },
        "model": {"path": str(folder)},
        "data": {
            "train": [{"type": "jsonl", "path": str(tiny_run.write_jsonl(folder / "train.jsonl", rows))}],
            "eval": [{"type": "jsonl", "path": str(tiny_run.write_jsonl(folder / "eval.jsonl", rows[2:]))}],
            "max_length": 64,
            "over_length": "drop",
            "shuffle": False,
        },
        "num_epochs": 1,
        "run_dir": str(folder / "run"),
    }
    return tiny_run.write_recipe(folder / "recipe.yaml", blocks)


def told(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["data", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["data", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


RED = "<|im_start|>user\nred?<|im_end|>\n<|im_start|>assistant\n"


def test_prompts_in_training_order(recipe: Path, capsys: pytest.CaptureFixture[str]):
    from transformers import AutoTokenizer

    first, dropped, last = objects(told(capsys, recipe, "-n", "9", "--format", "json"))
    tokenizer = AutoTokenizer.from_pretrained(recipe.parent)
    assert tokenizer.decode(first["token_ids"]) == RED
    assert tokenizer.convert_tokens_to_ids(first["tokens"]) == first["token_ids"]
    assert first["asked"] == [{"role": "user", "content": "red?"}]
    assert (first["index"], first["columns"], last["columns"]) == (0, {"answer": "red"}, {"of": ["a", 1]})
    assert dropped == {
        "index": 1, "where": f"{recipe.parent / 'train.jsonl'}:2", "dropped": "prompt longer than 63 tokens",
    }  # fmt: skip


def test_prompts_for_people(recipe: Path, capsys: pytest.CaptureFixture[str]):
    path = recipe.parent / "train.jsonl"
    assert told(capsys, recipe, "-n", "1") == (
        f"{path}:1 | prompt 0 | 12 tokens, room for 52\n{RED}\n  answer: red\n\n"
    )
    two = told(capsys, recipe, "-n", "2")  # what is left out does not count
    assert f"{path}:2 | prompt 1 | left out: prompt longer than 63 tokens\n" in two
    assert '  of: ["a", 1]\n' in two
    held_out = told(capsys, recipe, "--split", "eval")
    assert held_out.startswith(f"{recipe.parent / 'eval.jsonl'}:1 | prompt 0 | ") and "dog?" in held_out


def test_prompts_that_cannot_be_asked_are_refused_by_their_place(recipe: Path, capsys: pytest.CaptureFixture[str]):
    said = refused(capsys, recipe, "data.over_length=refuse")
    assert f"{recipe.parent / 'train.jsonl'}:2: the prompt has " in said
    assert "data.eval: the recipe has no eval data" in refused(capsys, recipe, "data.eval=[]", "--split", "eval")


def rollout(text: str, reward: float, advantage: float | None, **other: Any) -> dict[str, Any]:
    said = {"text": text, "reward": reward, "terms": {"right": reward, "brief": 0.5}, "advantage": advantage}
    return said | {"tokens": 3, "finish_reason": "stop", "lag": 0, "turns": 1} | other


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two prompts of step 2, one of step 12."""
    folder = tmp_path / "run" / "rollouts"
    folder.mkdir(parents=True)
    groups = [
        {"index": 4, "where": "t.jsonl:5", "prompt": "2+2?", "rollouts": [rollout("4\x1b[2J", 1.0, 1.5)]},
        {"index": 5, "where": "t.jsonl:6", "prompt": "1+1?", "rollouts": []},
    ]
    late = [rollout("x [b]", 0.0, -0.25, lag=2, turns=3, tokens=1, finish_reason="length"), rollout("", 0.5, None)]
    tiny_run.write_jsonl(folder / "step-000002.jsonl", groups)
    tiny_run.write_jsonl(folder / "step-000012.jsonl", [{**groups[1], "rollouts": late}])
    return tmp_path / "run"


def test_rollouts_for_people(run: Path, capsys: pytest.CaptureFixture[str]):
    assert told(capsys, run, "--rollouts") == (
        "t.jsonl:6 | prompt 5\n1+1?\n"
        "  0: reward 0 of right 0, brief 0.5 | advantage -0.25 | 1 token, length | 3 turns | lag 2\nx [b]\n"
        "  1: reward 0.5 of right 0.5, brief 0.5 | 3 tokens, stop\n\n\n"
        f"step 12 of {run}: 1 of 1 prompt; steps 2 and 12 kept\n"
    )
    # What a model writes is not obeyed by a terminal.
    early = told(capsys, run, "--rollouts", "--step", "2", "-n", "1")
    assert "  0: reward 1 of right 1, brief 0.5 | advantage +1.5 | 3 tokens, stop\n4\\x1b[2J\n" in early
    assert early.endswith(f"step 2 of {run}: 1 of 2 prompts; steps 2 and 12 kept\n")


def test_rollouts_that_the_terminal_has_no_letters_for(run: Path):
    said = {"index": 0, "where": "t.jsonl:1", "prompt": "\udc80", "rollouts": [rollout("да", 1.0, None)]}
    tiny_run.write_jsonl(run / "rollouts" / "step-000013.jsonl", [said])
    command = [sys.executable, "-m", "burnish", "data", str(run), "--rollouts"]
    told = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "latin-1"}, capture_output=True, timeout=60)
    assert (told.returncode, told.stderr) == (0, b"")
    assert b"prompt 0\n\\udc80\n" in told.stdout and b"\n\\u0434\\u0430\n" in told.stdout


def test_rollouts_as_json(run: Path, capsys: pytest.CaptureFixture[str]):
    first, second = objects(told(capsys, run, "--rollouts", "--step", "2", "--format", "json"))
    assert (first["step"], first["index"], first["rollouts"][0]["text"]) == (2, 4, "4\x1b[2J")
    assert second == {"step": 2, "index": 5, "where": "t.jsonl:6", "prompt": "1+1?", "rollouts": []}


def test_rollouts_that_are_not_there(recipe: Path, run: Path, capsys: pytest.CaptureFixture[str]):
    said = refused(capsys, run, "--rollouts", "--step", "3")
    assert f"{run}: no rollouts of step 3" in said and "kept are those of steps 2 and 12" in said
    assert f"{recipe.parent / 'run'}: it holds no rollouts" in refused(capsys, recipe, "--rollouts")
    with pytest.raises(SystemExit) as usage:
        main(["data", str(recipe), "--step", "3"])
    assert usage.value.code == 2 and "--step is one of --rollouts" in capsys.readouterr().err
