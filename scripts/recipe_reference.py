"""Writes docs/recipe.md from the recipe's schema: every key, its values, its default, whether a resume may change it.

python scripts/recipe_reference.py [--print]
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from burnish.component import Component, Config, Free, OneOf
from burnish.recipe import Recipe
from burnish.recipe.explain import parts

PAGE = Path(__file__).parents[1] / "docs" / "recipe.md"

INTRODUCTION = """\
# Recipe reference

Written by `make docs` from the schema; do not edit. `burnish check --schema` prints the same as JSON Schema, which
editors understand.

A recipe is one YAML 1.2 file. Unknown keys and keys given twice are refused. Values are taken as they are written:
`1.0`, `"12"` and `true` are not whole numbers, `yes` is text, `1e-4` is a number. Paths are relative to the folder that
the command is typed in. On the command line, `key.path=value` changes one value, where the value is YAML and lists are
numbered from 0; blocks that are missing are created, and one past a list's end appends to it:

    burnish train recipes/quickstart.yaml optimizer.learning_rate=1e-4 data.train.0.path=mine.jsonl "track=[]"

Where a block has a `type`, the type names one of the choices below, or a class of your own as `module:Class`, from a
file beside the recipe or in the current folder. *Resume*: a run that is started again goes on only if all `fixed`
values are what they were; `free` ones may change.
"""


def page() -> str:
    """The whole page."""
    return INTRODUCTION + "\n" + "\n".join(_block(Recipe, "", free=False, written={})) + "\n"


def _block(block: type[Config], path: str, *, free: bool, written: dict[str, str]) -> Iterator[str]:
    """A table, then what stands below it. `written`: folders of choices that were described before, and where."""
    yield from _table(block, free=free)
    for name, field in block.model_fields.items():
        here = f"{path}.{name}" if path else name
        inner_free = free or _is_free(field)
        for choice, base in parts(field.annotation, field.metadata):
            yield f"\n{'#' * min(4, here.count('.') + 2)} `{here}`\n"
            if choice is None:
                yield f"{_doc(base)}\n"
                yield from _block(base, here, free=inner_free, written=written)
            elif choice.package in written:
                default = f"; by default `{{type: {choice.default}}}`" if choice.default else ""
                yield f"The same choices as `{written[choice.package]}`{default}."
            else:
                written[choice.package] = here
                yield from _choices(choice, base, here, free=inner_free, written=written)


def _choices(choice: OneOf, base: type[Component], path: str, *, free: bool, written: dict[str, str]) -> Iterator[str]:
    for number, kind in enumerate(choice.types()):
        default = " (the default)" if kind == choice.default else ""
        gap = "\n" * (number > 0)
        yield f"{gap}**`type: {kind}`**{default}: {_doc(choice.find(base, kind))}\n"
        yield from _block(choice.find(base, kind), path, free=free, written=written)


def _table(block: type[Config], *, free: bool) -> Iterator[str]:
    fields = {name: field for name, field in block.model_fields.items() if name != "type"}
    if not fields:
        return
    properties = block.model_json_schema(ref_template="{model}")["properties"]
    yield "| key | value | default | resume | |"
    yield "|---|---|---|---|---|"
    for name, field in fields.items():
        resume = "free" if free or _is_free(field) else "fixed"
        said = " ".join((field.description or "").split()).replace("|", "\\|")
        value = _values(properties[name])
        if any(parts(field.annotation, field.metadata)):
            words = [f"`{inner['const']}`" for inner in properties[name].get("anyOf", []) if "const" in inner]
            value = " or ".join([*words, "a block, below"])
        value = "a list of blocks, below" if properties[name].get("type") == "array" and "below" in value else value
        yield f"| `{name}` | {value} | {_default(field)} | {resume} | {said} |"


def _is_free(field: FieldInfo) -> bool:
    return any(isinstance(mark, Free) for mark in field.metadata)


def _doc(block: type[Config]) -> str:
    return " ".join(inspect.cleandoc(block.__doc__ or "").split("\n\n")[0].split())


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, Component):
        return f"`{{type: {value.type}}}`"
    if isinstance(value, Config):
        return "its defaults"
    return "absent" if value is None else f"`{json.dumps(value)}`"


BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
NAMES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "`true` or `false`",
    "null": "null",
}


def _values(schema: dict[str, Any]) -> str:
    """What a JSON Schema allows, in words."""
    if "anyOf" in schema:
        return " or ".join(_values(inner) for inner in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "array":
        items = schema.get("items") or {"anyOf": schema.get("prefixItems", [])}
        return "list of " + " or ".join(dict.fromkeys(_values(items).split(" or ")))
    if kind == "object":
        return "block of keys"
    bounds = " and ".join(f"{sign} {schema[key]:g}" for key, sign in BOUNDS.items() if key in schema)
    return f"{NAMES.get(str(kind), 'anything')} {bounds}".strip()


if __name__ == "__main__":
    if "--print" in sys.argv:
        sys.stdout.write(page())
    else:
        PAGE.write_text(page(), encoding="utf-8")
        print(PAGE)
