"""From a recipe file and overrides to a `Recipe`, or to everything that is wrong with them."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError
from pydantic_core import to_json

from burnish.errors import ModelError, RecipeError, UserError
from burnish.launch import layout
from burnish.recipe import checks, explain, written
from burnish.recipe.schema import Recipe

if TYPE_CHECKING:
    from burnish.launch.layout import Misfit


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, ranks: int | Literal["all"] | None = None
) -> Recipe:
    """The recipe at `path`, a YAML file or a run folder, with `key.path=value` overrides applied in order.

    The recipe's folder and the current folder become importable, so that `type: my_module:MyClass` is found there.

    Args:
        ranks: how many it is to run on, and must be fit for; `all` that its launch or the environment says. None: what
            is not about running it, such as looking at its data.

    Raises:
        RecipeError: with all errors of writing and schema; if there are none, with all of parts that do not fit.
    """
    file = _existing(Path(path))
    source = written.read(file)
    if Path(path).is_dir():
        source.data["run_dir"] = str(path)  # of a moved or copied run, too; what it was called then is another folder
    for override in overrides:
        source.override(override)
    for folder in (str(file.resolve().parent), str(Path.cwd())):
        # At the end: a `random.py` beside a recipe must not replace Python's.
        if folder not in sys.path:
            sys.path.append(folder)
    try:
        recipe = Recipe.model_validate_json(to_json(source.data, inf_nan_mode="constants"))
    except ValidationError as error:
        problems = source.problems + explain.explain(error, source)
        raise RecipeError(tuple(sorted(problems, key=_line))) from None
    found = [] if ranks is None else _layout(recipe, layout.world_size(recipe) if ranks == "all" else ranks)
    problems = source.problems or checks.misfits(recipe, source, found)
    if problems:
        raise RecipeError(tuple(sorted(problems, key=_line)))
    return recipe


def _layout(recipe: Recipe, world_size: int) -> list[Misfit]:
    """What does not divide; the model's configuration is only read where its layers are cut."""
    hf_config = None
    if recipe.mesh != "auto" and recipe.mesh.tp > 1:
        from burnish.model.load import load_config

        with contextlib.suppress(ModelError):  # said when the model is opened
            hf_config = load_config(recipe.model)
    return layout.misfits(recipe, world_size, hf_config)


def _line(problem: UserError) -> float:
    """Problems are told in the order of the file; those of the whole file first, of overrides last."""
    line = problem.where.rpartition(":")[2]
    return float(line) if line.isdecimal() else float("inf") if problem.where.startswith("override") else 0.0


def _existing(path: Path) -> Path:
    file = path / "recipe.json" if path.is_dir() else path
    if file.is_file():
        return file
    here = [str(found) for pattern in ("*.yaml", "*.yml", "recipes/*.yaml") for found in Path().glob(pattern)]
    beside = [str(found) for found in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(str(path), sorted({*here, *beside}), n=3, cutoff=0.5)
    cure = f"did you mean {' or '.join(near)}?" if near else "`burnish recipes ls` lists the shipped ones"
    raise RecipeError((UserError("no such recipe", where=str(file), cure=cure),))
