"""`burnish data`: what is shown, on a pipe and as JSON, is what was packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from burnish.cli import main
from tests import tiny_run


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


ROWS = [
    chat("red?", "red"),
    {"prompt": "one two", "completion": " three"},
    chat("dog?", "no, a \u00e9l\u00e9phant [bold]"),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rows once through, in file order, one lane, a row of 64; the eval set is the first of them."""
    folder = tmp_path_factory.mktemp("data-command")
    tiny_run.write_tokenizer(folder)
    tiny_run.write_jsonl(folder / "train.jsonl", ROWS)
    tiny_run.write_jsonl(folder / "eval.jsonl", ROWS[:1])
    blocks = {
        "model": {"path": str(folder)},
        "data": {
            "train": [{"type": "jsonl", "path": str(folder / "train.jsonl")}],
            "eval": [{"type": "jsonl", "path": str(folder / "eval.jsonl")}],
            "max_length": 64,
            "packing": {"type": "best_fit", "lanes": 1},
            "shuffle": False,
        },
        "num_epochs": 1,
        "run_dir": str(folder / "run"),
    }
    return tiny_run.write_recipe(folder / "recipe.yaml", blocks)


def lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert main(["data", *arguments, "--format", "json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_json(recipe: Path, capsys: pytest.CaptureFixture[str]):
    from transformers import AutoTokenizer

    *samples, last = lines(capsys, str(recipe), "-n", "100")
    tokenizer = AutoTokenizer.from_pretrained(recipe.parent)
    by_source = {Path(sample["source"]).name: sample for sample in samples}
    assert sorted(by_source) == ["train.jsonl:1", "train.jsonl:2", "train.jsonl:3"]
    for sample in samples:
        assert tokenizer.convert_tokens_to_ids(sample["tokens"]) == sample["token_ids"]
    texts = {
        source: (
            tokenizer.decode(sample["token_ids"]),
            tokenizer.decode([t for t, m in zip(sample["token_ids"], sample["loss_mask"], strict=True) if m]),
        )
        for source, sample in by_source.items()
    }
    assert texts["train.jsonl:1"] == (
        "<|im_start|>user\nred?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n",
        "red<|im_end|>",
    )
    assert texts["train.jsonl:2"] == ("one two three<|im_end|>", " three<|im_end|>")
    assert texts["train.jsonl:3"][1] == "no, a \u00e9l\u00e9phant [bold]<|im_end|>"
    ledger = last["ledger"]
    tokens = sum(len(sample["token_ids"]) for sample in samples)
    assert ledger["samples"] == 3
    assert sum(ledger["tokens"].values()) == tokens
    assert ledger["tokens"]["trained"] == sum(sum(sample["loss_mask"]) for sample in samples)
    assert ledger["slots"] - ledger["padding"] == tokens
    assert {sample["row"] for sample in samples} == set(range(ledger["blocks"]))


def test_n_counts_samples(recipe: Path, capsys: pytest.CaptureFixture[str]):
    *samples, last = lines(capsys, str(recipe), "data.packing={type: none, lanes: 1}", "-n", "2")
    assert [(Path(sample["source"]).name, sample["row"]) for sample in samples] == [
        ("train.jsonl:1", 0),
        ("train.jsonl:2", 1),
    ]
    assert last["ledger"]["blocks"] == 2


def test_text_in_a_pipe(recipe: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", str(recipe), "--split", "eval"]) == 0
    shown = capsys.readouterr().out
    head, _, rest = shown.partition("\n")
    assert head.startswith(f"{recipe.parent}/eval.jsonl:1 | packed row 0 | ")
    assert rest.startswith(
        "<|im_start|>user\nred?<|im_end|>\n<|im_start|>assistant\n[[red<|im_end|>]]\n",
    )
    assert "data.eval" in rest
    assert "1 packed rows, " in rest


def test_brackets_of_the_text_are_not_markup(recipe: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", str(recipe), "-n", "3"]) == 0
    assert "[[no, a \u00e9l\u00e9phant [bold]<|im_end|>]]" in capsys.readouterr().out


def test_trained_tokens_are_coloured_on_a_terminal(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the pipe for a terminal
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(["data", str(recipe), "--split", "eval"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b[1;32mred<|im_end|>\x1b[0m" in shown
    assert "[[" not in shown


def test_what_was_dropped_from_the_eval_rows_is_in_the_ledger(recipe: Path, capsys: pytest.CaptureFixture[str]):
    more = ["data.eval.1.type=jsonl", f"data.eval.1.path={recipe.parent / 'train.jsonl'}"]
    *samples, last = lines(
        capsys, str(recipe), *more, "data.max_length=30", "data.over_length=drop", "--split", "eval", "-n", "100"
    )
    names = [Path(sample["source"]).name for sample in samples]
    assert "train.jsonl:2" in names and "train.jsonl:3" not in names
    counts = {name: (part["samples"], part["dropped"]) for name, part in last["ledger"]["sources"].items()}
    assert counts["data.eval.1"] == (3, 3 - sum(name.startswith("train") for name in names))
    assert last["ledger"]["tokens"]["dropped: longer than max_length"] > 30


@pytest.mark.parametrize("number", ["-1", "0", "2.5"])
def test_a_number_of_samples_is_at_least_one(recipe: Path, capsys: pytest.CaptureFixture[str], number: str):
    with pytest.raises(SystemExit) as ended:
        main(["data", str(recipe), "-n", number])
    assert ended.value.code == 2
    assert f"'{number}' is not a whole number from 1 on" in capsys.readouterr().err


def test_a_refused_row_comes_after_what_was_good(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([json.dumps(ROWS[0]), json.dumps({"messages": [{"role": "human", "content": "x"}]}), ""]))
    overrides = [f"data.train=[{{type: jsonl, path: {path}}}]", "data.packing={type: none, lanes: 1}"]
    assert main(["data", str(recipe), *overrides, "--format", "json"]) == 2
    captured = capsys.readouterr()
    sample, ledger = (json.loads(line) for line in captured.out.splitlines())
    assert sample["source"] == f"{path}:1"
    assert ledger["ledger"]["samples"] == 1
    assert f"{path}:2: messages[0].role: unknown role 'human'" in captured.err
    assert "cure: did you mean 'user'?" in captured.err


def test_an_eval_split_that_is_not_there(recipe: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", str(recipe), "data.eval=[]", "--split", "eval"]) == 2
    assert capsys.readouterr().err.startswith("data.eval: the recipe has no eval data\n")
