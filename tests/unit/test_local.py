"""The order in which a run's parts are opened: cheap refusals first."""

from __future__ import annotations

from pathlib import Path

import pytest

from burnish.errors import DataError, UserError
from burnish.recipe import Recipe
from tests import tiny_run


def test_a_missing_eval_file_is_refused_before_the_weights_are_read(tiny_model: Path, tiny_train: Path, tmp_path: Path):
    model = tmp_path / "model-without-weights"
    model.mkdir()
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (model / file.name).write_bytes(file.read_bytes())
    blocks = tiny_run.recipe(model, tiny_train, tmp_path / "run")
    blocks["data"]["eval"] = [{"type": "jsonl", "path": str(tmp_path / "nowhere.jsonl")}]
    recipe = Recipe.model_validate(blocks)
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        recipe.launch.run(recipe)


def test_several_ranks_are_refused(
    tiny_model: Path, tiny_train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = Recipe.model_validate(tiny_run.recipe(tiny_model, tiny_train, tmp_path / "run"))
    with pytest.raises(UserError, match="one process for now, and this is one of 2"):
        recipe.launch.run(recipe)
    assert not (tmp_path / "run").exists()
