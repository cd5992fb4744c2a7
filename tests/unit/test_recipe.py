"""From a recipe file to a Recipe, or to everything that is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import RecipeError
from burnish.recipe import Recipe, load_recipe

GOOD = """\
model:
  path: some/model
  adapter: {type: lora, r: 8}
data:
  train: [{type: jsonl, path: train.jsonl}]
  eval: [{type: jsonl, path: eval.jsonl}]
  max_length: 512
optimizer: {learning_rate: 1e-4}
schedule: {type: cosine, warmup_steps: 5}
num_steps: 20
run_dir: runs/a
"""
REGRESSION = "workflow={{type: reward, loss: {{type: regression, label: {0}}}}}"
CLASS_AND_NUMBER = (
    "workflow={{type: reward, loss: {{type: sum, terms: ["
    "{{loss: {{type: classification, head: kind}}}}, {{loss: {{type: regression, head: size, label: {0}}}}}]}}}}"
)
TWO_HEADS = "model.head={type: multi, heads: {kind: {type: classification, labels: [a, b]}, size: {type: scalar}}}"
OWN_LOSS = """
from burnish.losses.base import Loss

class Focal(Loss):
    gamma: float = 2.0
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    file = tmp_path / "r.yaml"
    file.write_text(GOOD)
    return file


def problems(file: Path, *overrides: str) -> list[str]:
    """What is wrong, without the folder's name, as `place: reason [cure]`."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides)
    return [
        f"{p.where.removeprefix(f'{file.parent}/')}: {p.reason}" + f" [{p.cure}]" * bool(p.cure)
        for p in caught.value.problems
    ]


def edited(file: Path, *changes: tuple[str, str]) -> Path:
    text = GOOD
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)
    return file


def test_a_recipe_is_read_with_its_defaults(recipe_file):
    recipe = load_recipe(recipe_file)
    assert recipe.optimizer.type == "adamw" and recipe.optimizer.learning_rate == 1e-4
    assert recipe.workflow.type == "sft" and recipe.workflow.model_dump()["loss"] == {"type": "nll"}
    assert recipe.data.packing.type == "best_fit" and recipe.data.renderer.type == "chat"
    assert (recipe.micro_batch_size, recipe.max_grad_norm, recipe.num_epochs, recipe.seed) == (1, 1.0, None, 0)
    assert (recipe.checkpoint.save_every, recipe.checkpoint.keep, recipe.launch.type) == (100, 2, "local")


def test_overrides_are_applied_in_order(recipe_file):
    recipe = load_recipe(recipe_file, ["num_steps=7", "num_steps=9", "data.packing={type: none}", "max_grad_norm=null"])
    assert (recipe.num_steps, recipe.data.packing.type, recipe.max_grad_norm) == (9, "none", None)


def test_all_schema_errors_at_once_in_the_order_of_the_file(recipe_file):
    file = edited(
        recipe_file,
        ("some/model", "[1]"),
        ("r: 8", "rank: 8, target_modules: [q_proj, 3]"),
        ("path: train.jsonl", "pth: train.jsonl"),
        ("max_length: 512", "max_lenght: 512\n  max_length: 5.0"),
        ("1e-4", "'1e-4'"),
        ("cosine", "cosin"),
        ("num_steps: 20", "max_steps: 20\nnum_steps: 2\nnum_steps: 3"),
        ("run_dir: runs/a", "lora_alpha: 3"),
    )
    assert problems(file, "seed=yes", "nothing") == [
        "r.yaml: run_dir: is missing [add `run_dir`: Folder of the run: recipe, metrics, checkpoints, export]",
        "r.yaml:2: model.path: should be text, not a list",
        "r.yaml:3: model.adapter.target_modules.1: should be text, not 3",
        "r.yaml:3: model.adapter.rank: unknown key [known here: type, r, lora_alpha, lora_dropout, use_rslora, "
        "use_dora, target_modules, layers_to_transform, modules_to_save]",
        "r.yaml:5: data.train.0.path: is missing [add `path`: A file, a folder of *.jsonl, a glob such as "
        "`data/part-*.jsonl`, or a URL that fsspec reads (`s3://...`)]",
        "r.yaml:5: data.train.0.pth: unknown key [did you mean `path`?]",
        "r.yaml:7: data.max_lenght: unknown key [did you mean `max_length`?]",
        "r.yaml:8: data.max_length: should be a whole number, not 5.0 [write 5]",
        "r.yaml:9: optimizer.learning_rate: should be a number, not '1e-4' (text) [write 1e-4 without quotes]",
        "r.yaml:10: schedule: no type 'cosin', did you mean 'cosine'?; one of: constant, cosine, linear, wsd, "
        "module:Class",
        "r.yaml:11: max_steps: unknown key [did you mean `num_steps`?]",
        "r.yaml:13: num_steps: given twice, first at r.yaml:12 [remove one]".replace("at r", f"at {file.parent}/r"),
        "r.yaml:14: lora_alpha: unknown key [it belongs to another block: `model.adapter.lora_alpha`]",
        "override 'nothing': not of the form key.path=value [such as num_steps=20]",
        "override 'seed=yes': seed: should be a whole number, not 'yes' (text)",
    ]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("data.shuffle=yes", "data.shuffle: should be true or false, not 'yes' (text) [YAML 1.2 knows `true` and"),
        ("num_steps=true", "num_steps: should be a whole number, not true"),
        ("num_steps=0", "num_steps: should be greater than or equal to 1, not 0"),
        ("max_grad_norm=.inf", "max_grad_norm: should be a finite number, not Infinity"),
        ("seed=null", "seed: should be a whole number, not null [give a value, or remove the key"),
        ("model=x", "model: should be a block of keys, not 'x' (text)"),
        ("track=tensorboard", "track: should be a list, not 'tensorboard' (text) [write [tensorboard]]"),
        ("model.dtype=fp32", "model.dtype: should be 'float32'"),
        ("model.adapter.target_modules=3", "model.adapter.target_modules: should be text or a list, not 3"),
        ("optimizer.lr=1", "optimizer.lr: unknown key [that is `optimizer.learning_rate` here]"),
        ("model.adapter={r: 4}", "model.adapter: the key `type` is missing; one of: lora, qlora, module:Class"),
        ("workflow.loss=nll", "workflow.loss: expected a block such as {type: nll}"),
        ("data.train=[]", "data.train: List should have at least 1 item"),
    ],
)
def test_an_override_that_does_not_fit_says_why_and_what_to_write(recipe_file, override, problem):
    [told] = problems(recipe_file, override)
    assert told.startswith(f"override '{override}': {problem}")


def test_parts_that_do_not_fit_are_told_all_at_once(recipe_file):
    without_eval = ("  eval: [{type: jsonl, path: eval.jsonl}]\n", "")
    file = edited(recipe_file, without_eval, ("run_dir", "eval_every: 5\nrun_dir"))
    told = problems(
        file,
        "num_epochs=1",
        "schedule.warmup_steps=21",
        "global_batch_size=7",
        "micro_batch_size=3",
        "data.packing.row_length=256",
        "model.trust_remote_code=true",
    )
    assert [line.split(" [")[0] for line in told] == [
        "r.yaml:10: eval_every: there is nothing to evaluate on",
        "override 'num_epochs=1': num_epochs: the run has two lengths, 20 steps and 1 epochs",
        "override 'schedule.warmup_steps=21': schedule.warmup_steps: the warm-up of 21 steps is longer than the run of "
        "20",
        "override 'global_batch_size=7': global_batch_size: 7 packed rows a step are not a whole number of "
        "micro-batches of 3",
        "override 'data.packing.row_length=256': data.packing.row_length: rows of 256 tokens cannot hold a document of "
        "max_length 512",
        "override 'model.trust_remote_code=true': model.trust_remote_code: would run whatever code some/model has at "
        "'main' on the day of the run",
    ]
    assert "6 or 9; or micro_batch_size: 1" in told[3]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["num_steps=null"], "num_steps: the run has no length [add `num_steps: 100` or `num_epochs: 1`]"),
        (["global_batch_size=2", "micro_batch_size=4"], "[4; or micro_batch_size: 2]"),
        (["global_batch_size=12", "micro_batch_size=8"], "[8 or 16; or micro_batch_size: 6]"),
        (["num_steps=null", "num_epochs=2", "data.train.0.streaming=true"], "data.train.0.streaming: the length of a"),
        (["model.trust_remote_code=true", f"model.revision={'g' * 40}"], "model.trust_remote_code: would run"),
        (
            [REGRESSION.format("weight"), "model.head={type: scalar}"],
            "workflow: the column `weight` multiplies a row's",
        ),
        (
            [CLASS_AND_NUMBER.format("label"), TWO_HEADS],
            "workflow: the column `label` would have to be a class for one",
        ),
        (
            [
                "model={config: {model_type: llama}}",
                "data.tokenizer={type: pretrained, path: x, add_tokens: {tokens: [a]}}",
            ],
            "data.tokenizer.add_tokens.train: the other rows of a fresh model are random",
        ),
    ],
)
def test_each_misfit(recipe_file, overrides, problem):
    [told] = problems(recipe_file, *overrides)
    assert problem in told


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.packing.row_length=512"],
        ["schedule.warmup_steps=20"],
        ["num_steps=null", "num_epochs=2"],
        ["data.train.0.streaming=true"],
        ["model.trust_remote_code=true", f"model.revision={'0a' * 20}"],
        ["global_batch_size=6", "micro_batch_size=3", "eval_every=5"],
        [CLASS_AND_NUMBER.format("length"), TWO_HEADS],
    ],
)
def test_what_just_fits_is_taken(recipe_file, overrides):
    load_recipe(recipe_file, overrides)


def test_schema_errors_come_before_misfits(recipe_file):
    assert problems(recipe_file, "num_steps=null", "sed=1") == [
        "override 'sed=1': sed: unknown key [did you mean `seed`?]"
    ]


def test_a_resolved_recipe_is_json_and_comes_back_equal(recipe_file, tmp_path):
    (tmp_path / "my_losses.py").write_text(OWN_LOSS)
    recipe = load_recipe(recipe_file, ["workflow.loss={type: 'my_losses:Focal', gamma: 3}"])
    saved = json.loads(json.dumps(recipe.resolved()))
    assert saved["workflow"]["loss"] == {"type": "my_losses:Focal", "gamma": 3.0}
    assert saved["optimizer"]["betas"] == [0.9, 0.999]
    again = Recipe.model_validate(saved)
    assert again == recipe
    assert type(again.workflow.loss).__name__ == "Focal"  # pyright: ignore[reportAttributeAccessIssue]


def test_a_run_folder_is_a_recipe(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(recipe.resolved(), indent=2))
    # The run in the folder that was named, whatever it was called when it was started.
    assert load_recipe(tmp_path / "run") == recipe.model_copy(update={"run_dir": str(tmp_path / "run")})
    assert load_recipe(tmp_path / "run", ["seed=1"]).seed == 1


def changed(file: Path, *overrides: str) -> list[str]:
    before: dict[str, Any] = json.loads(json.dumps(load_recipe(file).resolved()))
    return load_recipe(file, overrides).changed_fixed_fields(before)


def test_a_resume_may_change_what_is_free(recipe_file):
    free = ["stop_after=5", "eval_every=2", "checkpoint.keep=7", "run_dir=elsewhere", "data.prefetch=3"]
    assert changed(recipe_file, *free, "track=[{type: tensorboard}]") == []


def test_a_resume_is_told_what_fixed_fields_changed(recipe_file):
    assert changed(recipe_file, "data.max_length=1024", "schedule={type: linear}", "stop_after=3", "seed=1") == [
        "data.max_length: 512 -> 1024",
        'schedule.type: "cosine" -> "linear"',
        "schedule.warmup_steps: 5 -> 0",
        "seed: 0 -> 1",
    ]


def test_a_missing_recipe_names_the_nearest(recipe_file):
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file.parent / "rr.yaml")
    assert caught.value.cure == f"did you mean {recipe_file}?"
    assert caught.value.where.endswith("rr.yaml")


def test_a_module_beside_the_recipe_does_not_replace_python_s_own(recipe_file, tmp_path):
    (tmp_path / "fractions.py").write_text("raise RuntimeError")
    load_recipe(recipe_file)
    import fractions

    assert fractions.Fraction(1, 2) == 0.5
