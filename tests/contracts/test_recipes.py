"""Shipped recipes and the page that describes them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from burnish.component import Config
from burnish.recipe import Recipe, load_recipe
from burnish.recipe.explain import parts

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))


def test_recipes_are_shipped():
    assert [file.stem for file in SHIPPED].count("quickstart") == 1


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_recipe_loads_and_comes_back_from_json(file):
    recipe = load_recipe(file)
    again = Recipe.model_validate(json.loads(json.dumps(recipe.resolved())))
    assert again == recipe
    assert recipe.changed_fixed_fields(again.resolved()) == []


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_recipe_is_short_and_says_what_it_does(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40
    assert lines[0].startswith("# ") and lines[0].endswith(".")


def test_the_reference_page_is_what_the_schema_says():
    script = importlib.util.spec_from_file_location("recipe_reference", ROOT / "scripts" / "recipe_reference.py")
    assert script is not None and script.loader is not None
    module = importlib.util.module_from_spec(script)
    script.loader.exec_module(module)
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == module.page(), "run `make docs`"


def blocks(block: type[Config]) -> Iterator[type[Config]]:
    yield block
    for field in block.model_fields.values():
        for choice, base in parts(field.annotation, field.metadata):
            if choice is None:
                yield from blocks(base)


def test_every_field_of_every_block_is_documented():
    for block in blocks(Recipe):
        assert not [name for name, field in block.model_fields.items() if not field.description], block


def test_the_json_schema_says_what_a_resume_may_change():
    properties = Recipe.model_json_schema()["properties"]
    free = {name for name, schema in properties.items() if schema["resume"] == "free"}
    where = {"track", "launch", "mesh", "run_dir", "chosen"}
    assert free == {"eval_every", "stop_after", "checkpoint", "anomaly"} | where
    assert {schema["resume"] for schema in properties.values()} == {"free", "fixed"}
