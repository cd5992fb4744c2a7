"""One choice is one file: dropped into its folder, it is found, documented and saved; nothing else is edited."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from burnish.component import Component, Config, OneOf
from burnish.recipe import Recipe
from burnish.recipe.explain import parts

TEMPLATE = """
from __future__ import annotations
from typing import Literal
from {module} import {base}

class Dropped({base}):
    '''Just dropped here.'''

    type: Literal["dropped"] = "dropped"
    strength: float = 0.5
    '''How much.'''
{required}
"""


def choices(block: type[Config] = Recipe) -> Iterator[tuple[OneOf, type[Component]]]:
    """Every choice that a recipe has, built-in components' own choices included."""
    for field in block.model_fields.values():
        for choice, base in parts(field.annotation, field.metadata):
            if choice is None:
                yield from choices(base)
                continue
            yield choice, base
            for kind in choice.types():
                yield from choices(choice.find(base, kind))


CHOICES = {choice.package: (choice, base) for choice, base in choices()}


def test_the_recipe_s_choices():
    assert set(CHOICES) == {
        "burnish.advantages",
        "burnish.corrections",
        "burnish.data.packing",
        "burnish.data.renderers",
        "burnish.data.sources",
        "burnish.data.tokenizers",
        "burnish.environments",
        "burnish.launch",
        "burnish.losses",
        "burnish.losses.rl",
        "burnish.model.adapters",
        "burnish.model.heads",
        "burnish.policy.optimizers",
        "burnish.rewards",
        "burnish.rollout.engines",
        "burnish.rollout.sync",
        "burnish.rollout.workers",
        "burnish.schedules",
        "burnish.track",
        "burnish.workflows",
    }


@pytest.mark.parametrize("package", sorted(CHOICES))
def test_a_file_dropped_into_a_folder_needs_no_other_edit(package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    choice, base = CHOICES[package]
    required = "    learning_rate: float = 0.1" if base.__name__ == "Optimizer" else ""
    text = TEMPLATE.format(module=base.__module__, base=base.__name__, required=required)
    (tmp_path / "dropped.py").write_text(text)
    folder = importlib.import_module(package)
    monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(tmp_path)])
    try:
        assert "dropped" in choice.types()
        found: Any = choice.find(base, "dropped").model_validate({"strength": 2})
        assert found.model_dump()["strength"] == 2.0
    finally:
        sys.modules.pop(f"{package}.dropped", None)


@pytest.mark.parametrize("package", sorted(CHOICES))
def test_every_choice_is_one_documented_class_named_as_its_file(package):
    choice, base = CHOICES[package]
    assert choice.types()
    assert choice.default in (None, *choice.types())
    for kind in choice.types():
        component = choice.find(base, kind)
        assert component.model_fields["type"].default == kind
        assert component.__doc__ and component.__doc__ != base.__doc__, component
        undocumented = [n for n, f in component.model_fields.items() if n != "type" and not f.description]
        assert not undocumented, (component, undocumented)
