"""`burnish check`: what it refuses, what it says, and the numbers in its estimates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from burnish import cli
from burnish.commands import _sizes
from burnish.model.load import load_config
from burnish.model.plan import ONE_RANK, Plan, Work, plan
from burnish.recipe import Recipe
from tests import tiny_run


@pytest.fixture
def blocks(tiny_model: Path, tiny_train: Path, tmp_path: Path) -> dict[str, Any]:
    return tiny_run.recipe(tiny_model, tiny_train, tmp_path / "run")


def check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], blocks: dict[str, Any], *arguments: str
) -> dict[str, Any]:
    """The report of `burnish check --json`, and its exit code as `code`."""
    file = tiny_run.write_recipe(tmp_path / "r.yaml", blocks)
    code = cli.main(["check", str(file), "--json", *arguments])
    return {"code": code, **json.loads(capsys.readouterr().out)}


def lines(report: dict[str, Any], verdict: str, stage: str = "") -> list[str]:
    return [f["text"] for f in report["findings"] if f["verdict"] == verdict and stage in f["stage"]]


def test_a_good_recipe_is_ready(tmp_path, capsys, blocks):
    report = check(tmp_path, capsys, blocks)
    assert (report["code"], report["ok"]) == (0, True)
    assert not lines(report, "refused")
    stages = list(dict.fromkeys(finding["stage"] for finding in report["findings"]))
    assert stages == [
        "schema", "run", "files", "model", "tokenizer", "template", "masks", "batch", "disk", "memory",
    ]  # fmt: skip
    assert lines(report, "ok", "files")[0].endswith("200 rows")
    assert "320 ids in 320 embedding rows" in lines(report, "ok", "tokenizer")[0]
    # Embedding 320 x 48 (tied), two layers of 4 projections, 3 MLP matrices and 2 norms, a last norm.
    layer = 2 * 48 * 48 + 2 * 24 * 48 + 3 * 48 * 96 + 2 * 48
    assert lines(report, "ok", "model")[1] == f"{320 * 48 + 2 * layer + 48:,} parameters, 57,072 of them trained"


def test_the_report_for_people_ends_with_the_command(tmp_path, capsys, blocks):
    file = tiny_run.write_recipe(tmp_path / "r.yaml", blocks)
    assert cli.main(["check", str(file), "num_steps=5"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("ok       schema ")
    assert said.endswith(f"\nready: burnish train {file} num_steps=5\n")


def test_masks_are_counted_on_the_rows_asked_for(tmp_path, capsys, blocks):
    row = {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "red"}]}
    blocks["data"]["train"][0]["path"] = str(tiny_run.write_jsonl(tmp_path / "t.jsonl", [row] * 5))
    [few] = lines(check(tmp_path, capsys, blocks, "-n", "2"), "ok", "masks")
    [all_] = lines(check(tmp_path, capsys, blocks, "--all"), "ok", "masks")
    assert few.startswith("data.train.0: the first 2 rows") and all_.startswith("data.train.0: all 5 rows")
    dropped = check(tmp_path, capsys, blocks, "-n", "3", "data.max_length=5", "data.packing={type: none}")
    assert any(line.startswith("data.train.0: the first 3 rows") for line in lines(dropped, "refused", "masks"))
    # <|im_start|> user \n red <|im_end|> \n and the same of the assistant, where `red <|im_end|>` is trained.
    tokens = len(_ids(blocks, "<|im_start|>user\nred<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"))
    trained = len(_ids(blocks, "red<|im_end|>"))
    assert f"{5 * tokens:,} tokens: {1 - trained / tokens:.1%} masked, {trained / tokens:.1%} trained" in all_


def _ids(blocks: dict[str, Any], text: str) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(blocks["model"]["path"])(text).input_ids


@pytest.fixture
def spoilt(tmp_path: Path, blocks: dict[str, Any]) -> dict[str, Any]:
    """20 good rows, then one of each kind of bad row."""
    good = [json.dumps(row) for row in tiny_run.conversations(20)]
    long = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "?" * 100}]}
    silent = {"messages": [{"role": "user", "content": "a"}]}
    bad = ['{"messages": [', json.dumps(long), json.dumps(silent), '{"unheard": "of"}']
    file = tmp_path / "spoilt.jsonl"
    file.write_text("\n".join([*good, *bad]) + "\n")
    blocks["data"]["train"][0]["path"] = str(file)
    return blocks


def test_every_bad_row_is_named_by_file_and_line(tmp_path, capsys, spoilt):
    report = check(tmp_path, capsys, spoilt, "--all")
    assert (report["code"], report["ok"]) == (2, False)
    refused = lines(report, "refused")
    assert len(refused) == 4
    for number in (21, 22, 23, 24):
        assert sum(f"{tmp_path / 'spoilt.jsonl'}:{number}: " in line for line in refused) == 1
    assert any("max_length is 64" in line for line in refused)


def test_rows_beyond_the_first_are_looked_at_only_if_asked(tmp_path, capsys, spoilt):
    assert check(tmp_path, capsys, spoilt, "-n", "20")["code"] == 0


def test_a_stream_is_checked_up_to_its_first_bad_row(tmp_path, capsys, spoilt):
    spoilt["data"]["train"][0]["streaming"] = True
    report = check(tmp_path, capsys, spoilt, "--all")
    [refused] = lines(report, "refused")
    assert f"{tmp_path / 'spoilt.jsonl'}:21" in refused
    assert "20 rows" in lines(report, "ok", "masks")[0]


def test_everything_that_can_be_known_is_told_at_once(tmp_path, capsys, blocks):
    blocks["data"]["train"].append({"type": "jsonl", "path": str(tmp_path / "nowhere.jsonl")})
    blocks["data"]["eval"] = [{"type": "jsonl", "path": str(tmp_path / "nor-here.jsonl")}]
    blocks["model"]["path"] = str(tmp_path / "no-model")
    report = check(tmp_path, capsys, blocks)
    refused = lines(report, "refused")
    assert report["code"] == 2
    assert all(any(part in line for line in refused) for part in ("nowhere.jsonl", "nor-here.jsonl"))
    assert {f["stage"] for f in report["findings"] if f["verdict"] == "refused"} == {"files", "model", "tokenizer"}


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(tmp_path, capsys, blocks, tiny_model):
    small = tmp_path / "small"
    shutil.copytree(tiny_model, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    blocks["model"]["path"] = str(small)
    refused = lines(check(tmp_path, capsys, blocks), "refused", "tokenizer")
    assert len(refused) == 1
    assert refused[0].endswith("the tokenizer has ids up to 319, the model's embedding has 300 rows")


def test_documents_longer_than_a_table_of_positions_are_refused_before_weights_are_read(
    tmp_path, capsys, blocks, tiny_model
):
    fields = {"n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0, "n_positions": 64, "vocab_size": 320}
    folder = tmp_path / "gpt2"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **fields}))
    tokenizer = {"type": "pretrained", "path": str(folder)}
    fresh = {"config": {"model_type": "gpt2", **fields}}
    for model, cure in (({"path": str(folder)}, "take a model with"), (fresh, "take more positions for the fresh")):
        recipe = blocks | {"model": model, "data": blocks["data"] | {"tokenizer": tokenizer}}
        assert not lines(check(tmp_path, capsys, recipe), "refused")  # 64 of 64
        recipe["data"]["max_length"] = 65
        report = check(tmp_path, capsys, recipe)
        [refused] = [finding for finding in report["findings"] if finding["verdict"] == "refused"]
        assert refused["text"].startswith("data.max_length: documents of 65 tokens, and ")
        assert refused["text"].endswith(" has a table of 64 learned positions")
        assert refused["cure"].startswith("lower it to 64, ") and cure in refused["cure"]
        assert cli.main(["train", str(tiny_run.write_recipe(tmp_path / "r.yaml", recipe))]) == 2
        assert "data.max_length: documents of 65 tokens" in capsys.readouterr().err


def test_documents_longer_than_rotary_embeddings_were_made_for_are_warned_of(tmp_path, capsys, blocks):
    def warned(length: int) -> list[str]:
        blocks["data"] |= {"max_length": length, "packing": {"type": "best_fit", "row_length": 512}}
        return lines(check(tmp_path, capsys, blocks), "warning", "model")

    assert warned(256) == []
    [warning] = warned(257)
    assert warning.startswith("data.max_length is 257, and ") and warning.endswith(" was made for 256 positions")


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path, capsys, blocks, tiny_model):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare)
    for file in (bare / "chat_template.jinja", bare / "tokenizer_config.json"):
        if file.suffix == ".jinja":
            file.unlink(missing_ok=True)
        else:
            config = json.loads(file.read_text())
            config.pop("chat_template", None)
            file.write_text(json.dumps(config))
    blocks["model"]["path"] = str(bare)
    report = check(tmp_path, capsys, blocks, "-n", "1")
    assert report["code"] == 2
    assert any("no chat template" in line for line in lines(report, "refused", "masks"))


def test_a_run_folder_of_another_recipe_is_refused(tmp_path, capsys, blocks):
    (tmp_path / "run").mkdir()
    saved = Recipe.model_validate(blocks).resolved()
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(saved))
    assert lines(check(tmp_path, capsys, blocks, "seed=7"), "ok", "run") == [f"{tmp_path / 'run'}: a new run"]
    (tmp_path / "run" / "checkpoint-2").mkdir()
    (tmp_path / "run" / "checkpoint-2" / "manifest.json").touch()
    assert "goes on where it was left" in lines(check(tmp_path, capsys, blocks), "ok", "run")[0]
    [refused] = lines(check(tmp_path, capsys, blocks, "seed=7", "stop_after=3"), "refused")
    assert refused.endswith("holds a run of another recipe: seed: 0 -> 7")
    (tmp_path / "run" / "recipe.json").write_text('{"seed": ')
    [refused] = lines(check(tmp_path, capsys, blocks), "refused")
    assert "the recipe that the checkpoints here belong to cannot be read" in refused


def test_schema_errors_are_findings_too(tmp_path, capsys, blocks):
    report = check(tmp_path, capsys, blocks | {"num_stps": 3, "sed": 4})
    assert report["code"] == 2
    assert [(f["stage"], f["cure"]) for f in report["findings"]] == [
        ("schema", "did you mean `num_steps`?"),
        ("schema", "did you mean `seed`?"),
    ]


def test_an_epoch_is_packed_as_training_will(blocks):
    recipe = Recipe.model_validate(blocks)
    # Rows of 128: two documents of 60 fill 120 of them.
    length, fill, documents = _sizes.epoch(recipe, [(1.0, [60, 60, 60])])
    assert (length, documents) == (128, 2.0)
    assert fill == pytest.approx(120 / 128)
    # Three samples of 30 to one of 38: a row takes 30 + 30 + 30 + 38, exactly.
    _, fill, documents = _sizes.epoch(recipe, [(3.0, [30]), (1.0, [38])])
    assert fill > 0.99 and documents == pytest.approx(4, rel=0.01)
    alone = recipe.model_copy(
        update={"data": recipe.data.model_validate(blocks["data"] | {"packing": {"type": "none"}})}
    )
    assert _sizes.epoch(alone, [(1.0, [16])]) == (64, 0.25, 1.0)


def planned(recipe: Recipe) -> Plan:
    """Its model on one rank."""
    work = Work(recipe.global_batch_size, recipe.micro_batch_size, 128)
    return plan(recipe.model, load_config(recipe.model), ONE_RANK, work)


def test_adapter_parameters_are_counted_without_making_them(blocks, tiny_model):
    model = blocks["model"] | {"adapter": {"type": "lora", "r": 2}}
    count = planned(Recipe.model_validate(blocks | {"model": model}))
    # r (in + out) of q, k, v, o, gate, up, down in two layers; the head is left alone.
    assert count.num_trained == 2 * 2 * ((48 + 48) * 2 + (48 + 24) * 2 + (48 + 96) * 3)
    assert count.num_parameters == 57_072 + count.num_trained
    named = Recipe.model_validate(
        blocks | {"model": blocks["model"] | {"adapter": {"type": "lora", "r": 4, "target_modules": ["q_proj"]}}}
    )
    assert planned(named).num_trained == 2 * 4 * (48 + 48)


def test_estimates_are_their_formulas(blocks, tiny_model):
    recipe = Recipe.model_validate(blocks)
    laid_out = planned(recipe)
    parts = laid_out.memory("none")
    assert parts["weights"][0] == parts["gradients"][0] == 4 * 57_072
    assert parts["optimizer"][0] == 8 * 57_072
    # 320 x 4 x (2 x 128 tokens + 48 rows of the head's own gradient)
    assert parts["projection"][0] == 320 * 4 * (2 * 128 + 48)
    # Two kept checkpoints and the one being written, each weights and two moments; and the export.
    assert _sizes.disk_bytes(recipe, laid_out) == 3 * 12 * 57_072 + 4 * 57_072
    stored = {"checkpoint": blocks["checkpoint"] | {"store": "s3://bucket/run"}}
    assert _sizes.disk_bytes(Recipe.model_validate(blocks | stored), laid_out) == 4 * 57_072
    # Of an adapter no more than its own weights is ever written.
    adapted = Recipe.model_validate(blocks | {"model": blocks["model"] | {"adapter": {"type": "lora", "r": 1}}})
    trained = 2 * ((48 + 48) * 2 + (48 + 24) * 2 + (48 + 96) * 3)
    assert _sizes.disk_bytes(adapted, planned(adapted)) == (3 * 12 + 4) * trained
