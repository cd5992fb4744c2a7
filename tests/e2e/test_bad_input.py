"""Bad input: exit code 2, a message that names place, reason and cure, and nothing lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import tiny_run
from tests.e2e_helpers import Lab, column, events
from tests.zygote import Zygote

GOOD = json.dumps(tiny_run.conversations(1)[0]).encode()


class Bad(NamedTuple):
    """What is wrong with a recipe, and what a person must be told."""

    changes: dict[str, Any]
    said: tuple[str, ...]
    key: str = ""
    """Of the recipe: the message begins with the line that it is on."""


@pytest.fixture
def lab(zygote: Zygote, tmp_path: Path, tiny_model: Path, tiny_train: Path) -> Lab:
    return Lab(zygote, tmp_path, tiny_model, tiny_train)


def misspelt_key(lab: Lab) -> Bad:
    said = ("optimizer.learning_rat: unknown key", "did you mean `learning_rate`?")
    return Bad({"optimizer": {"type": "adamw", "learning_rat": 0.1}}, said, key="learning_rat")


def wrong_type(lab: Lab) -> Bad:
    said = ("num_steps: should be a whole number, not '12' (text)", "cure: write 12 without quotes")
    return Bad({"num_steps": "12"}, said, key="num_steps")


def impossible_batch(lab: Lab) -> Bad:
    said = ("global_batch_size: 9 packed rows a step", "micro-batches of 6", "cure: 6 or 12; or micro_batch_size: 3")
    return Bad({"global_batch_size": 9, "micro_batch_size": 6}, said, key="global_batch_size")


def unknown_component(lab: Lab) -> Bad:
    return Bad(
        {"optimizer": {"type": "adamv"}}, ("optimizer: no type 'adamv', did you mean 'adamw'?",), key="optimizer"
    )


def missing_loss_class(lab: Lab) -> Bad:
    workflow = {"type": "sft", "loss": {"type": "nowhere:Loss"}}
    return Bad({"workflow": workflow}, ("workflow.loss: cannot import 'nowhere:Loss'", "beside the recipe"), key="loss")


IN_THE_RECIPE = (misspelt_key, wrong_type, impossible_batch, unknown_component, missing_loss_class)


def missing_file(lab: Lab) -> Bad:
    near = lab.folder / "train.jsonl"
    shutil.copyfile(lab.train_file, near)
    return with_file(lab.folder / "trian.jsonl", "no such file", f"did you mean {near}?")


def missing_model(lab: Lab) -> Bad:
    return Bad({"model": {"path": str(lab.folder / "modle")}}, (f"{lab.folder / 'modle'}: no such", "cure: "))


def no_chat_template(lab: Lab) -> Bad:
    folder = shutil.copytree(lab.model_path, lab.folder / "model")
    (folder / "chat_template.jinja").unlink()
    said = (f"{lab.train_file}:", "the tokenizer has no chat template", "data.renderer.chat_template_path")
    return Bad({"model": {"path": str(folder)}}, said)


def mask_that_cannot_be_proved(lab: Lab) -> Bad:
    return with_template(lab, tiny_run.CHATML.replace("message['content']", "message['content'] | upper"), "template")


def template_that_loops(lab: Lab) -> Bad:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    return with_template(lab, loop + tiny_run.CHATML, "was stopped: more than 2 s of processor time")


def template_that_allocates(lab: Lab) -> Bad:
    grow = "{% set ns = namespace(x='x') %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
    return with_template(lab, grow + tiny_run.CHATML, "template", "memory")


def more_ids_than_embeddings(lab: Lab) -> Bad:
    folder = shutil.copytree(lab.model_path, lab.folder / "model")
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 300}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:300].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    said = ("ids up to 319", "300 rows", "cure: use the model's own tokenizer")
    return Bad({"model": {"path": str(folder)}}, said)


def no_rows(lab: Lab) -> Bad:
    (lab.folder / "bad.jsonl").write_text("\n\n")
    return with_file(lab.folder / "bad.jsonl", "holds no row")


def bad_json(lab: Lab) -> Bad:
    return with_line(lab, GOOD.replace(b'"role"', b"role") + b"\n", "bad JSON", "at column")


def bad_utf8(lab: Lab) -> Bad:
    return with_line(lab, GOOD.replace(b"turn", b"t\xfcrn") + b"\n", "byte 0xfc at column", "is not UTF-8", "iconv")


def truncated_last_line(lab: Lab) -> Bad:
    return with_line(lab, GOOD[:-20], "the last line is cut short", at=200)


def not_a_conversation(lab: Lab) -> Bad:
    return with_line(
        lab, b'{"question": "a", "answer": "b"}\n', "unknown format: the row has question, answer", "columns: {"
    )


def unknown_role(lab: Lab) -> Bad:
    return with_line(
        lab, GOOD.replace(b"assistant", b"asistant") + b"\n", "messages[1].role", "did you mean 'assistant'?"
    )


def empty_assistant_turn(lab: Lab) -> Bad:
    return with_line(lab, conversation("hello", ""), "messages[1]: empty assistant turn", "remove the turn")


def nothing_to_train(lab: Lab) -> Bad:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]}
    return with_line(
        lab, json.dumps(row).encode() + b"\n", "no token to train", "let an assistant turn of it be trained"
    )


def too_long(lab: Lab) -> Bad:
    line = conversation("hello", "cat " * 100)
    return with_line(lab, line, "tokens, max_length is 64", "raise `data.max_length`", "truncate or drop")


BEYOND_THE_RECIPE = (
    missing_file,
    missing_model,
    no_chat_template,
    mask_that_cannot_be_proved,
    template_that_loops,
    template_that_allocates,
    more_ids_than_embeddings,
    no_rows,
    bad_json,
    bad_utf8,
    truncated_last_line,
    not_a_conversation,
    unknown_role,
    empty_assistant_turn,
    nothing_to_train,
    too_long,
)


def with_file(path: Path, *said: str) -> Bad:
    return Bad({"data": {"train": [{"type": "jsonl", "path": str(path)}]}}, (f"{path}: ", *said))


def with_line(lab: Lab, line: bytes, *said: str, at: int = 3) -> Bad:
    """Line `at` of the training file, counted from 1, is `line`; one epoch is trained, so that it is reached."""
    lines = lab.train_file.read_bytes().splitlines(keepends=True)
    lines[at - 1] = line
    path = lab.folder / "bad.jsonl"
    path.write_bytes(b"".join(lines))
    bad = with_file(path)
    return Bad(bad.changes | {"num_steps": None, "num_epochs": 1}, (f"{path}:{at}: ", *said, "cure: "))


def with_template(lab: Lab, template: str, *said: str) -> Bad:
    path = lab.folder / "template.jinja"
    path.write_text(template)
    return Bad({"data": {"renderer": {"type": "chat", "chat_template_path": str(path)}}}, (str(path), *said, "cure: "))


def conversation(asked: str, answer: str) -> bytes:
    row = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
    return json.dumps(row).encode() + b"\n"


def refused(lab: Lab, said: tuple[str, ...], *command: str | Path) -> None:
    code, output = lab.burnish(*command)
    assert code == 2, output
    assert "Traceback" not in output
    assert len(output) < 6000, output
    missing = [words for words in said if words not in output]
    assert not missing, output


@pytest.mark.parametrize("case", IN_THE_RECIPE, ids=lambda case: case.__name__)
def test_a_recipe_that_cannot_be_is_refused_before_anything_is_made(case: Callable[[Lab], Bad], lab: Lab) -> None:
    bad = case(lab)
    recipe = lab.recipe("run", **bad.changes)
    line = next(n for n, text in enumerate(recipe.read_text().splitlines(), 1) if f'"{bad.key}"' in text)
    said = (f"{recipe}:{line}: {bad.said[0]}", *bad.said[1:])
    refused(lab, said, "train", recipe)
    assert not (lab.folder / "run").exists()
    refused(lab, said, "check", recipe)


@pytest.mark.parametrize("case", BEYOND_THE_RECIPE, ids=lambda case: case.__name__)
def test_what_a_recipe_names_is_refused_and_the_corrected_command_runs(case: Callable[[Lab], Bad], lab: Lab) -> None:
    bad = case(lab)
    recipe = lab.recipe("run", **bad.changes)
    refused(lab, bad.said, "check", recipe, "--all")
    assert not (lab.folder / "run").exists()
    refused(lab, bad.said, "train", recipe)
    code, output = lab.burnish("check", lab.recipe("run", num_steps=1, schedule={"type": "constant"}))
    assert code == 0, output
    lab.resume("run")
    assert len(column(lab.folder / "run", "loss")) == 1
