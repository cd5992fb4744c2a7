"""Bad input: exit code 2, a message that names place, reason and cure, and nothing lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import tiny_run
from tests.e2e_helpers import Lab, column, ledger
from tests.zygote import Zygote


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
    twice = tiny_run.CHATML.replace("message['content'] +", "message['content'] + message['content'] +")
    return with_template(lab, twice, "the loss mask cannot be proved: the template renders a content twice")


def template_that_loops(lab: Lab) -> Bad:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    return with_template(lab, loop + tiny_run.CHATML, "was stopped: more than 2 s of processor time")


def template_that_allocates(lab: Lab) -> Bad:
    return with_template(lab, "{% set x = 'a' * 2147483647 %}" + tiny_run.CHATML, "too much memory")


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


BEYOND_THE_RECIPE = (
    missing_file,
    missing_model,
    no_chat_template,
    mask_that_cannot_be_proved,
    template_that_loops,
    template_that_allocates,
    more_ids_than_embeddings,
    no_rows,
)


def with_file(path: Path, *said: str) -> Bad:
    return Bad({"data": {"train": [{"type": "jsonl", "path": str(path)}]}}, (f"{path}: ", *said))


def with_template(lab: Lab, template: str, *said: str) -> Bad:
    path = lab.folder / "template.jinja"
    path.write_text(template)
    return Bad({"data": {"renderer": {"type": "chat", "chat_template_path": str(path)}}}, (str(path), *said, "cure: "))


def refused(lab: Lab, said: tuple[str, ...], *command: str | Path) -> str:
    code, output = lab.burnish(*command)
    assert code == 2, output
    assert "Traceback" not in output
    missing = [words for words in said if words not in output]
    assert not missing, output
    return output


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
def test_what_a_recipe_names_is_refused_before_the_first_step(case: Callable[[Lab], Bad], lab: Lab) -> None:
    bad = case(lab)
    recipe = lab.recipe("run", **bad.changes)
    refused(lab, bad.said, "check", recipe)
    assert not (lab.folder / "run").exists()
    output = refused(lab, bad.said, "train", recipe)
    assert len(output) < 1000, output
    left = {path.name for path in (lab.folder / "run").iterdir()}
    assert left <= {"run.lock", "recipe.json", "tokens.json", "events.jsonl", "metrics.jsonl"}


def test_the_corrected_command_runs_in_the_folder_of_a_refused_one(lab: Lab) -> None:
    bad = missing_file(lab)
    refused(lab, bad.said, "train", lab.recipe("run", **bad.changes))
    recipe = lab.recipe("run", num_steps=3)
    code, output = lab.burnish("check", recipe)
    assert code == 0, output
    code, output = lab.burnish("train", recipe)
    assert code == 0, output
    assert len(column(lab.folder / "run", "loss")) == 3


def conversation(asked: str, answer: str, **more: Any) -> bytes:
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer, **more}]
    return json.dumps({"messages": turns}).encode() + b"\n"


GOOD = conversation("turn around: one two", "two one")
BAD_LINES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "bad JSON": (GOOD.replace(b'"role"', b"role"), ("bad JSON: ", " at column ", "cure: fix or remove the line")),
    "bad UTF-8": (GOOD.replace(b"turn", b"t\xfcrn"), ("byte 0xfc at column ", " is not UTF-8", "iconv")),
    "unknown format": (b'{"asked": "a"}\n', ("unknown format: the row has asked; accepted are", "`columns: {")),
    "unknown role": (
        GOOD.replace(b'"assistant"', b'"asistant"'),
        ("messages[1].role: unknown role 'asistant'", "did you mean 'assistant'?"),
    ),
    "empty turn": (conversation("hello", " "), ("messages[1]: empty assistant turn", "remove the turn or the row")),
    "nothing trained": (conversation("hello", "you", train=False), ("the row has no token to train", "remove the row")),
    "too long": (conversation("hello", "cat " * 99), (" tokens, max_length is 64", "raise `data.max_length`")),
    "cut short": (GOOD[:-20], ("the last line is cut short", "write the file again, or remove its last line")),
}
"""A line and what is said about it. The last one stands at the end of the file."""

BAD_AT = 35
"""The line that is bad, of 40: the run has learned from some rows by then."""


def few(lab: Lab, name: str, line: bytes = GOOD, at: int = BAD_AT) -> Path:
    """40 rows in file order, one epoch of them, line `at` as given; returns the recipe."""
    lines = [json.dumps(row).encode() + b"\n" for row in tiny_run.conversations(40)]
    lines[BAD_AT - 1] = lines[-1] = GOOD
    lines[at - 1] = line
    path = lab.folder / f"{name}.jsonl"
    path.write_bytes(b"".join(lines))
    packing = {"type": "best_fit", "row_length": 128, "lanes": 1, "open_bins": 1}
    data = {"train": [{"type": "jsonl", "path": str(path)}], "shuffle": False, "packing": packing}
    return lab.recipe(name, data=data, num_steps=None, num_epochs=1)


def test_check_all_finds_every_bad_row_at_once(lab: Lab) -> None:
    path = lab.folder / "bad.jsonl"
    good = tiny_run.write_jsonl(path, tiny_run.conversations(100)).read_bytes()
    path.write_bytes(good + b"".join(line for line, _ in BAD_LINES.values()))
    recipe = lab.recipe("run", data={"train": [{"type": "jsonl", "path": str(path)}]})
    assert lab.burnish("check", recipe)[0] == 0  # the first 64 rows are good
    _, output = lab.burnish("check", recipe, "--all", "--json")
    report = json.loads(output)
    told = [f for f in report["findings"] if f["verdict"] == "refused"]
    assert not report["ok"] and len(told) == len(BAD_LINES)
    for number, (_, said) in enumerate(BAD_LINES.values(), 101):
        (finding,) = [f for f in told if f["text"].startswith(f"{path}:{number}: ")]
        shown = f"{finding['text']} cure: {finding['cure']}"
        assert all(words in shown for words in said), shown


@pytest.fixture(scope="module")
def undisturbed(
    zygote: Zygote, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_train: Path
) -> list[tuple[int, float, float]]:
    """Losses of the run on the 40 rows, all of them good."""
    lab = Lab(zygote, tmp_path_factory.mktemp("undisturbed"), tiny_model, tiny_train)
    few(lab, "run")
    lab.resume("run")
    return tiny_run.losses(lab.folder / "run")


@pytest.mark.parametrize("kind", ["bad JSON", "unknown role", "too long", "cut short"])
def test_a_bad_row_ends_the_run_after_a_checkpoint_and_once_mended_it_goes_on(
    kind: str, lab: Lab, undisturbed: list[tuple[int, float, float]]
) -> None:
    """Read, rendered, measured, cut short: each is found in another place on the way to a packed row."""
    line, said = BAD_LINES[kind]
    at = 40 if kind == "cut short" else BAD_AT
    recipe = few(lab, "mended", line, at)
    refused(lab, (f"{lab.folder / 'mended.jsonl'}:{at}: ", *said), "train", recipe)
    run_dir = lab.folder / "mended"
    done = tiny_run.losses(run_dir)
    assert done and (run_dir / f"checkpoint-{len(done)}").is_dir()

    if kind == "too long":  # nothing was mended yet: the same again, and nothing is lost
        refused(lab, said, "train", recipe)
        assert tiny_run.losses(run_dir) == done
    few(lab, "mended")
    lab.resume("mended")
    assert len(done) < len(undisturbed)
    assert tiny_run.losses(run_dir) == undisturbed


def test_a_bad_first_row_leaves_the_recipe_free_to_change(lab: Lab) -> None:
    line, said = BAD_LINES["too long"]
    refused(lab, said, "train", few(lab, "run", line, at=1))
    assert not list((lab.folder / "run").glob("checkpoint-*"))
    lab.resume("run", "data.over_length=drop")
    assert ledger(lab.folder / "run")["dropped"] == 1


def test_a_changed_field_is_refused_with_the_difference_and_the_old_recipe_goes_on(lab: Lab) -> None:
    run_dir = lab.train("run", "stop_after=4", expect=75)
    data = {"train": [{"type": "jsonl", "path": str(lab.train_file), "weight": 2.0}], "max_length": 96}
    other = lab.recipe("run", data=data, seed=3, stop_after=5, checkpoint={"save_every": 7})
    told = ("data.train.0.weight: 1.0 -> 2.0", "data.max_length: 64 -> 96", "seed: 0 -> 3", "cure: undo the change")
    output = refused(lab, told, "train", other)
    assert "stop_after" not in output and "save_every" not in output
    refused(lab, told[:3], "check", other)
    lab.recipe("run")
    lab.resume("run")
    assert len(column(run_dir, "loss")) == 12
