"""What `auto` stands for: chosen from model, devices and memory, kept by the run that began with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from burnish import cli
from burnish.errors import RecipeError
from burnish.launch.choose import DeviceFacts, choose, device_facts, with_save_every
from burnish.recipe import Recipe
from tests import tiny_run

MB = 2**20
AUTO = {"mesh": "auto"}
ROOMY = DeviceFacts("a GPU", 1000 * MB, computes_bfloat16=True, per_node=4)
HOST = DeviceFacts("a CPU", 10_000 * MB, computes_bfloat16=False, per_node=1, is_host=True)


@pytest.fixture
def blocks(tiny_train: Path, tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    """A fresh model of 8 layers, 64 lanes and rows a step, rows of 2,048; its 2 million weights, their
    gradients and moments are 31 MB."""
    recipe = tiny_run.recipe(tiny_model, tiny_train, tmp_path / "run", global_batch_size=64)
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8, "max_position_embeddings": 4096}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    recipe["model"] = {"config": {"model_type": "llama", **shape, **heads}}
    recipe["data"] |= {
        "tokenizer": {"type": "pretrained", "path": str(tiny_model)},
        "packing": {"type": "best_fit", "row_length": 2048, "lanes": 64},
    }
    return recipe


def chosen(blocks: dict[str, Any], ranks: int, facts: DeviceFacts, saved: Any = None, **model: Any) -> Recipe:
    recipe = Recipe.model_validate(blocks | {"model": blocks["model"] | model})
    return choose(recipe, ranks, facts, saved)[0]


def mesh(recipe: Recipe) -> dict[str, int]:
    assert recipe.mesh != "auto"
    return {name: size for name, size in recipe.mesh.model_dump().items() if size != 1}


def test_a_recipe_without_the_word_is_left_as_it_is(blocks):
    recipe = Recipe.model_validate(blocks)
    assert choose(recipe, 8, ROOMY) == (recipe, [])


def test_precision_is_the_devices(blocks):
    assert chosen(blocks, 1, ROOMY, dtype="auto").model.dtype == "bfloat16"
    assert chosen(blocks, 1, HOST, dtype="auto").model.dtype == "float32"
    assert device_facts(1).is_host or device_facts(1).memory_bytes > 0


def test_recomputation_is_the_least_that_fits(blocks):
    def least(memory: int) -> str:
        facts = ROOMY._replace(memory_bytes=memory * MB)
        return chosen(blocks, 1, facts, activation_checkpointing="auto").model.activation_checkpointing

    # Predicted are 236, 173 and 68 MB, which are nine tenths of 262, 192 and 76.
    assert [least(memory) for memory in (270, 250, 180, 60)] == ["none", "selective", "full", "full"]
    recipe = chosen(blocks, 1, ROOMY._replace(memory_bytes=60 * MB), activation_checkpointing="auto")
    assert recipe.chosen is not None
    assert "even that may not fit" in recipe.chosen.reasons["model.activation_checkpointing"]


def test_the_mesh_is_copies_in_nodes_where_they_fit(blocks):
    assert mesh(chosen(blocks | AUTO, 1, ROOMY)) == {}
    assert mesh(chosen(blocks | AUTO, 4, ROOMY)) == {"dp_shard": 4}
    assert mesh(chosen(blocks | AUTO, 16, ROOMY)) == {"dp_replicate": 4, "dp_shard": 4}


def test_a_copy_takes_more_nodes_where_it_must_and_layers_are_cut_where_that_is_not_enough(blocks):
    def on(memory: float) -> dict[str, int]:
        return mesh(
            chosen(blocks | AUTO, 16, ROOMY._replace(memory_bytes=int(memory * MB)), activation_checkpointing="full")
        )

    # Weights, gradients and moments are 31 MB over the ranks of a copy; 41 MB of the rest are halved by `tp` alone.
    assert on(60) == {"dp_replicate": 4, "dp_shard": 4}
    assert on(52) == {"dp_replicate": 2, "dp_shard": 8}
    assert on(49) == {"dp_shard": 16}
    assert on(40) == {"dp_replicate": 4, "dp_shard": 2, "tp": 2}


def test_ranks_beyond_the_rows_share_rows(blocks):
    """64 ranks on 16 rows a step: four to a row, which share layers, because a node has four."""
    few = blocks | AUTO | {"global_batch_size": 16}
    recipe = chosen(few, 64, ROOMY)
    assert mesh(recipe) == {"dp_replicate": 16, "tp": 4}
    assert recipe.chosen is not None
    said = recipe.chosen.reasons["mesh"]
    assert "passed over tp 1: 16 packed rows a step cannot be dealt to 64 shares of the data" in said
    # Key and value heads are four, rows have two parts of 1,024: of 512 ranks at most 8 can share one.
    with pytest.raises(RecipeError, match="no mesh of 512 ranks fits: 16 packed rows a step"):
        chosen(few, 512, ROOMY)


def test_a_run_keeps_what_it_began_with(blocks):
    asked = blocks | AUTO | {"model": blocks["model"] | {"dtype": "auto", "activation_checkpointing": "auto"}}
    began = chosen(asked, 4, ROOMY)
    saved = json.loads(json.dumps(began.resolved()))
    assert saved["chosen"]["world_size"] == 4 and saved["model"]["dtype"] == "bfloat16"
    written = Recipe.model_validate(asked)
    assert written.changed_fixed_fields(saved) == [], "`auto` is whatever was chosen"
    small = HOST._replace(memory_bytes=60 * MB)
    for again in (written, Recipe.model_validate(saved)):  # by its YAML, or by its run folder
        recipe, lines = choose(again, 4, small, saved)
        assert recipe == began
        assert [line.partition(":")[0] for line in lines] == ["model.dtype", "mesh", "model.activation_checkpointing"]
    other, _ = choose(written, 2, ROOMY, saved)
    assert mesh(other) == {"dp_shard": 2}, "another number of ranks is laid out anew"
    assert other.model == began.model
    plain = Recipe.model_validate(asked | {"mesh": {}, "model": blocks["model"]})
    assert plain.changed_fixed_fields(saved) == ['model.dtype: "bfloat16" -> "float32"']
    assert choose(plain, 4, ROOMY, saved) == (plain, [])


def test_auto_is_what_an_explicit_value_was(blocks):
    explicit = Recipe.model_validate(blocks | {"model": blocks["model"] | {"dtype": "bfloat16"}})
    auto = Recipe.model_validate(blocks | {"model": blocks["model"] | {"dtype": "auto"}})
    assert auto.changed_fixed_fields(explicit.resolved()) == []
    assert choose(auto, 1, HOST, explicit.resolved())[0].model.dtype == "bfloat16"


def test_the_interval_is_kept_once_it_is_known(blocks):
    checkpoint = {"checkpoint": {"save_every": "auto", "mean_hours_between_failures": 100.0}}
    recipe = Recipe.model_validate(blocks | checkpoint)
    assert choose(recipe, 1, ROOMY)[0].checkpoint.save_every == "auto"
    timed = with_save_every(recipe, 40, "a save took 2 s")
    again, lines = choose(recipe, 1, ROOMY, timed.resolved())
    assert again.checkpoint.save_every == 40 and lines == ["checkpoint.save_every: 40, a save took 2 s"]
    assert choose(recipe, 1, ROOMY, recipe.resolved())[0].checkpoint.save_every == "auto", "not timed yet"


def test_an_interval_wants_a_failure_rate(blocks, tmp_path, capsys):
    file = tiny_run.write_recipe(tmp_path / "r.yaml", blocks | {"checkpoint": {"save_every": "auto"}})
    assert cli.main(["check", str(file)]) == 2
    said = capsys.readouterr().out
    assert "checkpoint.save_every: how often to save depends on how often the run fails" in said


def test_a_plan_for_many_ranks_is_told(blocks, tmp_path, capsys):
    asked = blocks | AUTO | {"model": blocks["model"] | {"dtype": "auto", "activation_checkpointing": "auto"}}
    asked["checkpoint"] = {"mean_hours_between_failures": 10.0}
    file = tiny_run.write_recipe(tmp_path / "r.yaml", asked)
    assert (
        cli.main(["check", str(file), "--json", "--world-size", "64", "--device-gb", "1", "--store-gbs", "0.001"]) == 0
    )
    findings = json.loads(capsys.readouterr().out)["findings"]
    lines = {stage: [f["text"] for f in findings if f["stage"] == stage] for stage in {f["stage"] for f in findings}}
    assert [line.partition(",")[0] for line in lines["auto"]] == [
        "model.dtype: bfloat16",
        "mesh: dp_replicate 8 x dp_shard 8 x cp 1 x tp 1",
        "model.activation_checkpointing: none",
    ]
    assert "= 64 ranks; each computes 1 micro-batch of 1 rows a step" in lines["mesh"][0]
    assert [line.split()[-1] for line in lines["traffic"][:3]] == ["all-reduce", "all-gather", "reduce-scatter"]
    # 2 x 320 x 128 of embedding and head, 8 layers of 246,016 and a norm are 2,050,176 weights x 12 bytes.
    assert lines["checkpoint"][0].startswith("23 MB in all, up to 3 MB a rank; 25 s at 0.001 GB/s")
    # Eight copies read them, at a million bytes a second, behind the 120 seconds that are assumed.
    assert lines["recovery"][0].startswith("a failure every 10.0 hours (checkpoint.mean_hours_between_failures)")
    assert lines["recovery"][1].startswith(
        "a restart takes 5.3 minutes: 120 s assumed to begin, and 3.3 minutes to read"
    )
