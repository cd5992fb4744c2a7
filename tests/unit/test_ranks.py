"""How many ranks a recipe can be dealt to: what does not divide is refused with the nearest values that do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from burnish import cli
from burnish.errors import RecipeError
from burnish.launch.layout import misfits, nearest, world_size
from burnish.recipe import Recipe, load_recipe
from tests import tiny_run


@pytest.fixture
def blocks(tiny_model: Path, tiny_train: Path, tmp_path: Path) -> dict[str, Any]:
    """4 lanes, 2 rows a step, rows of 128; heads 4, of keys 2, features 96, vocabulary 320."""
    return tiny_run.recipe(tiny_model, tiny_train, tmp_path / "run")


def found(blocks: dict[str, Any], ranks: int, hf_config: Any = None, **changes: Any) -> list[tuple[str, str]]:
    """(key, cure) of all that does not fit."""
    recipe = Recipe.model_validate(blocks | changes)
    return [(".".join(map(str, m.path)), m.cure) for m in misfits(recipe, ranks, hf_config)]


def test_one_rank_fits_everything(blocks):
    packing = {"type": "best_fit", "row_length": 128, "lanes": 5}
    assert found(blocks, 1, global_batch_size=6, micro_batch_size=3, data=blocks["data"] | {"packing": packing}) == []


def test_rows_and_lanes_are_dealt_evenly(blocks):
    assert found(blocks, 2) == []
    rows, lanes = found(blocks, 3)
    assert rows == ("global_batch_size", "3, or fewer ranks, or mesh.tp or mesh.cp")
    assert lanes == ("data.packing.lanes", "3 or 6; a run that has begun keeps its lanes")
    # 8 ranks of which two share a row: 4 shares of the data.
    assert [key for key, _ in found(blocks, 8, mesh={"cp": 2})] == ["global_batch_size"]
    assert found(blocks, 4, global_batch_size=10, micro_batch_size=2)[0] == (
        "global_batch_size",
        "8 or 16, or fewer ranks, or mesh.tp or mesh.cp",
    )


def test_elastic_ranks_are_a_power_of_two_and_take_whole_micro_batches(blocks):
    elastic = {"determinism": "elastic", "global_batch_size": 12}
    assert found(blocks, 2, **elastic) == []
    lanes = {"data": blocks["data"] | {"packing": {"type": "best_fit", "row_length": 128, "lanes": 12}}}
    assert found(blocks, 6, **lanes, **elastic) == [("determinism", "start 4 or 8 ranks, or set it to fixed")]
    assert found(blocks, 6, **lanes, global_batch_size=12) == []
    # 2 ranks of micro-batches of 3 want lanes in turns of 6.
    assert found(blocks, 2, **elastic, micro_batch_size=3) == [
        ("data.packing.lanes", "6; a run that has begun keeps its lanes")
    ]


def test_the_axes_multiply_to_the_ranks(blocks):
    [(key, cure)] = found(blocks, 6, mesh={"tp": 4})
    assert (key, cure) == ("mesh", "start 4 or 8 ranks, or change the axes: their product is the number of ranks")
    [(_, cure)] = found(blocks, 6, mesh={"tp": 2, "dp_shard": 2})
    assert cure.startswith("start 4 ranks")


def test_tokens_are_shared_evenly(blocks):
    longer = {"data": blocks["data"] | {"packing": {"type": "best_fit", "row_length": 130, "lanes": 4}}}
    assert found(blocks, 2, **longer, mesh={"cp": 2}) == []
    assert found(blocks, 4, **longer, mesh={"cp": 2, "tp": 2}) == [("data.packing.row_length", "128 or 132")]
    assert found(blocks, 2, **longer, mesh={"tp": 2}) == [], "tp alone pads"
    whole = {"data": blocks["data"] | {"max_length": 65, "packing": {"type": "best_fit", "lanes": 4}}}
    assert found(blocks, 2, **whole, mesh={"cp": 2}) == [("data.max_length", "64 or 66")]


def test_heads_that_read_documents_are_not_cut(blocks):
    head = {"model": blocks["model"] | {"head": {"type": "scalar"}}}
    assert [key for key, _ in found(blocks, 2, **head, mesh={"cp": 2})] == ["model.head"]


def test_layers_are_cut_evenly(blocks):
    from transformers import AutoConfig

    hf_config = AutoConfig.from_pretrained(blocks["model"]["path"])
    assert found(blocks, 2, hf_config, mesh={"tp": 2}) == []
    [(key, cure)] = found(blocks, 4, hf_config, mesh={"tp": 4})
    assert (key, cure) == ("mesh.tp", "`tp: 2`")
    compiled = {"model": blocks["model"] | {"compile": {}}}
    assert [key for key, _ in found(blocks, 2, hf_config, **compiled, mesh={"tp": 2})] == ["model.compile"]


def test_all_of_it_is_refused_at_once_with_lines(blocks, tmp_path, capsys):
    blocks |= {"mesh": {"tp": 4}, "num_steps": 1, "schedule": {"type": "cosine", "warmup_steps": 2}}
    file = tiny_run.write_recipe(tmp_path / "r.yaml", blocks)
    text = file.read_text().splitlines()
    assert cli.main(["check", str(file), "--world-size", "12"]) == 2
    said = capsys.readouterr().out
    for key, reason in (
        ("global_batch_size", "2 packed rows a step cannot be dealt to 3 shares of the data"),
        ("lanes", "3 shares of the data do not divide 4 lanes"),
        ("warmup_steps", "the warm-up of 2 steps is longer than the run of 1"),
        ("tp", "num_key_value_heads 2 cannot be shared evenly by 4 ranks"),
    ):
        line = next(number for number, written in enumerate(text, 1) if f'"{key}"' in written)
        assert any(f"r.yaml:{line}: " in row and reason in row for row in said.splitlines()), (key, said)


def test_training_refuses_what_check_does(blocks, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    file = tiny_run.write_recipe(tmp_path / "r.yaml", blocks)
    assert cli.main(["train", str(file)]) == 2
    said = capsys.readouterr().err
    assert "2 packed rows a step cannot be dealt to 3 shares" in said and "do not divide 4 lanes" in said
    assert not (tmp_path / "run").exists()
    load_recipe(file)  # looking at the data does not need so many ranks
    with pytest.raises(RecipeError):
        load_recipe(file, ranks="all")


def test_the_number_of_ranks_is_the_launchs_or_the_environments(blocks, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert world_size(Recipe.model_validate(blocks)) == 1
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert world_size(Recipe.model_validate(blocks)) == 6
    started = blocks | {"launch": {"type": "processes", "num_workers": 4}}
    assert world_size(Recipe.model_validate(started)) == 4


@pytest.mark.parametrize(("value", "step", "said"), [(10, 4, "8 or 12"), (3, 4, "4"), (8, 4, "8")])
def test_nearest_multiples(value: int, step: int, said: str):
    assert nearest(value, step) == said
