"""What a recipe for many ranks is refused for, before anything is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from burnish.errors import RecipeError
from burnish.recipe import load_recipe
from tests import tiny_run

KTO = {"type": "preference", "loss": {"type": "kto"}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"determinism": "elastic", "mesh": {"tp": 2}}, "tp and cp cut the sums inside a layer"),
        ({"determinism": "elastic", "mesh": {"dp_replicate": 4}}, "1 or 2 with `determinism: elastic`"),
        ({"determinism": "elastic", "workflow": KTO}, "kto pairs prompts with answers of the same rank's rows"),
        ({"anomaly": {"action": "rollback", "steps_before": 9}}, "checkpoint.keep: 4, or fewer steps_before"),
    ],
)
def test_what_cannot_hold_its_promise_is_refused(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    blocks = tiny_run.recipe(tmp_path, tmp_path / "t.jsonl", tmp_path / "run") | changes
    with pytest.raises(RecipeError) as refused:
        load_recipe(str(tiny_run.write_recipe(tmp_path / "r.yaml", blocks)), [], ranks=4)
    assert expected in str(refused.value)
    assert f"{tmp_path / 'r.yaml'}:" in str(refused.value)


def test_what_can_is_not(tmp_path: Path) -> None:
    fine = {"determinism": "elastic", "mesh": {"dp_replicate": 2}, "anomaly": {"action": "rollback", "steps_before": 4}}
    blocks = tiny_run.recipe(tmp_path, tmp_path / "t.jsonl", tmp_path / "run") | fine
    recipe = load_recipe(str(tiny_run.write_recipe(tmp_path / "r.yaml", blocks)), [])
    assert recipe.determinism == "elastic"
