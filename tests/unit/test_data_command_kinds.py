"""`burnish data` on groups: which document is which, and what is said of it; `burnish check` on their labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from burnish.cli import main
from tests import tiny_run

USER = {"role": "user", "content": "which one is the bird?"}
PAIRS = [
    {"prompt": [USER], "chosen": [said], "rejected": [other], "margin": margin}
    for said, other, margin in [
        ({"role": "assistant", "content": "red"}, {"role": "assistant", "content": "blue one"}, 0.5),
        ({"role": "assistant", "content": "two"}, {"role": "assistant", "content": "dog"}, 0),
    ]
]


def recipe(folder: Path, rows: list[dict[str, Any]], workflow: dict[str, Any], **model: Any) -> Path:
    tiny_run.write_tokenizer(folder)
    tiny_run.write_jsonl(folder / "train.jsonl", rows)
    blocks = {
        "workflow": workflow,
        "model": {"path": str(folder), **model},
        "data": {
            "train": [{"type": "jsonl", "path": str(folder / "train.jsonl")}],
            "max_length": 64,
            "packing": {"type": "best_fit", "lanes": 1, "row_length": 128},
            "shuffle": False,
        },
        "num_epochs": 1,
        "run_dir": str(folder / "run"),
    }
    return tiny_run.write_recipe(folder / "recipe.yaml", blocks)


def samples(path: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert main(["data", str(path), "--format", "json", *arguments]) == 0
    *found, ledger = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sum(ledger["ledger"]["tokens"].values()) == ledger["ledger"]["slots"] - ledger["ledger"]["padding"]
    return found


DPO = {"type": "preference", "loss": {"type": "dpo"}}


def test_pairs_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, PAIRS, DPO)
    found = samples(path, capsys)
    assert [(s["group"], s["part"], s["prefix"] > 0) for s in found] == [
        (0, "prompt", False),
        (0, "chosen", True),
        (0, "rejected", True),
        (1, "prompt", False),
        (1, "chosen", True),
        (1, "rejected", True),
    ]
    assert [s["columns"]["margin"] for s in found] == [0, 0.5, 0.5, 0, 0, 0]
    assert found[1]["prefix"] == len(found[0]["token_ids"])
    assert [Path(s["source"]).name for s in found] == ["train.jsonl:1"] * 3 + ["train.jsonl:2"] * 3
    assert [s["part"] for s in samples(path, capsys, "-n", "1")] == ["prompt", "chosen", "rejected"]
    apart = samples(path, capsys, "data.renderer.share_prompt=false")
    assert [(s["part"], s["prefix"]) for s in apart] == [("chosen", 0), ("rejected", 0)] * 2
    assert apart[0]["token_ids"] == found[0]["token_ids"] + found[1]["token_ids"]


def test_pairs_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", str(recipe(tmp_path, PAIRS, DPO)), "-n", "1"]) == 0
    shown = capsys.readouterr().out
    prompt, chosen, rejected = (shown.index(f" | {part}") for part in ("prompt |", "chosen", "rejected"))
    assert prompt < chosen < rejected
    assert "train.jsonl:1 | packed row 0, group 0 | prompt | " in shown
    assert "| chosen behind the prompt's " in shown and " | 3 tokens, 2 trained | margin 0.5\n" in shown
    assert "[[red<|im_end|>]]" in shown and "[[blue one<|im_end|>]]" in shown
    assert shown.count("which one is the bird?") == 1


def test_rows_with_as_many_tokens_as_places_for_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, [{"prompt": "a", "completion": "b", "label": True}] * 9, DPO | {"loss": {"type": "kto"}})
    found = samples(path, capsys, "data.max_length=8", "data.packing.row_length=8")
    assert [s["part"] for s in found] == ["desirable"] * 3 and found[0]["columns"]["weight"] == 1.0


def test_judged_answers_steps_and_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False)]
    path = recipe(tmp_path, rows, {"type": "preference", "loss": {"type": "kto"}})
    assert [s["part"] for s in samples(path, capsys)] == ["desirable", "undesirable"]
    steps = [{"prompt": "a", "completions": ["b", "c"], "labels": [1, 0.5]}]
    path = recipe(tmp_path, steps, {"type": "reward", "loss": {"type": "process"}}, head={"type": "scalar"})
    assert main(["data", str(path)]) == 0
    assert "packed row 0 | 6 tokens, 2 trained | label 1, 0.5\n" in capsys.readouterr().out
    (graded,) = samples(path, capsys)
    assert graded["columns"]["label"] == [None, None, 1, None, 0.5, None]  # a \n b \n c and the end
    labelled = [{"text": "a", "label": "good"}, {"text": "b", "label": 0, "weight": 0.5}]
    head = {"type": "classification", "labels": ["bad", "good"]}
    path = recipe(tmp_path, labelled, {"type": "reward", "loss": {"type": "classification"}}, head=head)
    assert main(["data", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "1 trained | label good\n" in shown and "1 trained | weight 0.5 | label bad\n" in shown


@pytest.mark.parametrize(
    ("labels", "verdict"), [([True, True], "refused"), ([False, False], "refused"), ([True, False], "ok")]
)
def test_check_wants_both_labels(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], labels: list[bool], verdict: str
) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in labels]
    path = recipe(tmp_path, rows, {"type": "preference", "loss": {"type": "kto"}})
    code = main(["check", str(path), f"model.path={tiny_model}", "--json"])
    findings = [f for f in json.loads(capsys.readouterr().out)["findings"] if f["stage"] == "masks"]
    assert (code, findings[-1]["verdict"]) == (2 if verdict == "refused" else 0, verdict)
    word = "desirable" if labels[0] else "undesirable"
    assert (f"all 2 rows are {word}" in findings[-1]["text"]) == (verdict == "refused")
