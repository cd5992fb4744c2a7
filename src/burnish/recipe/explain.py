"""Schema errors as a person wants to read them: one a key, with its place, the reason, and what to write instead."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, cast, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, to_json

from burnish.component import Config, OneOf
from burnish.errors import UserError
from burnish.recipe.schema import Recipe
from burnish.recipe.written import KeyPath, Written, dotted

ELSEWHERE_CALLED = {
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attention",
    "gradient_checkpointing": "model.activation_checkpointing",
    "lora_r": "model.adapter.r",
    "lora_rank": "model.adapter.r",
    "lora_target_modules": "model.adapter.target_modules",
    "lora_modules_to_save": "model.adapter.modules_to_save",
    "load_in_4bit": "model.adapter.type",
    "dataset_name": "data.train",
    "datasets": "data.train",
    "max_seq_length": "data.max_length",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "sample_packing": "data.packing",
    "lr": "optimizer.learning_rate",
    "optim": "optimizer.type",
    "lr_scheduler_type": "schedule.type",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size",
    "max_steps": "num_steps",
    "num_train_epochs": "num_epochs",
    "epochs": "num_epochs",
    "eval_steps": "eval_every",
    "save_steps": "checkpoint.save_every",
    "save_total_limit": "checkpoint.keep",
    "report_to": "track",
    "output_dir": "run_dir",
}
"""What other trainers call our keys; only ever used to answer an unknown key."""

NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"

EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a block of keys",
    "model_type": "a block of keys",
}


def explain(error: ValidationError, written: Written) -> list[UserError]:
    """Every error of `error`, which came from validating `written.data` as a Recipe."""
    by_key: dict[KeyPath, list[ErrorDetails]] = defaultdict(list)
    for detail in error.errors(include_url=False):
        by_key[_key_path(detail, written.data)].append(detail)
    # Of a union `"all-linear" | list[str]` given ["a", 3], the branch that got further says more: key.1, not key.
    said = [
        path for path in by_key if not any(len(other) > len(path) and other[: len(path)] == path for other in by_key)
    ]
    return [_problem(path, by_key[path], written) for path in said]


def _key_path(detail: ErrorDetails, data: Any) -> KeyPath:
    """The error's location without what pydantic adds for the branches of a union, which no one wrote."""
    path: tuple[Any, ...] = ()
    for key in detail["loc"]:
        if (isinstance(data, Mapping) and key in data) or (isinstance(data, list) and isinstance(key, int)):
            path = (*path, key)
            data = data[path[-1]]
    if detail["type"] == "unfit":
        return (*path, *detail.get("ctx", {})["keys"])
    return (*path, detail["loc"][-1]) if detail["type"] == "missing" else path


def _problem(path: KeyPath, details: list[ErrorDetails], written: Written) -> UserError:
    kind = details[0]["type"]
    if kind == "extra_forbidden":
        reason, cure = "unknown key", _unknown_key(path, written.data)
    elif kind == "missing":
        field = block_at(path[:-1], written.data).model_fields[str(path[-1])]
        reason, cure = "is missing", f"add `{path[-1]}`: {_first_sentence(field)}"
    elif all(detail["msg"].startswith("Input should") for detail in details):
        given = details[0]["input"]
        wanted = " or ".join(dict.fromkeys(_expected(detail) for detail in details))
        reason, cure = f"should be {wanted}, not {_shown(given)}", _other_spelling(given, details)
    elif kind == "string_pattern_mismatch" and isinstance(path[-1], str):
        field = block_at(path[:-1], written.data).model_fields[path[-1]]
        reason, cure = f"{_shown(details[0]['input'])} is not of its form", f"write {_first_sentence(field)}"
    elif kind == "unfit":
        reason, cure = details[0].get("ctx", {})["reason"], details[0].get("ctx", {})["cure"]
    else:
        reason = "; ".join(detail["msg"].removeprefix("Value error, ") for detail in details)
        cure = _other_home(path, details[0])
    return UserError(f"{dotted(path)}: {reason}", where=written.place(path), cure=cure)


def _expected(detail: ErrorDetails) -> str:
    return EXPECTED.get(detail["type"], detail["msg"].removeprefix("Input should ").removeprefix("be "))


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a block of keys" if isinstance(value, dict) else "a list"
    return f"'{value}' (text)" if isinstance(value, str) else to_json(value, inf_nan_mode="constants").decode()


def _other_spelling(given: Any, details: list[ErrorDetails]) -> str:
    kinds = {detail["type"] for detail in details}
    if given is None:
        return "give a value, or remove the key to have its default"
    if isinstance(given, float) and kinds & {"int_type", "int_from_float"} and given.is_integer():
        return f"write {int(given)}"
    if isinstance(given, str) and "bool_type" in kinds:
        return "YAML 1.2 knows `true` and `false`; `yes`, `no`, `on` and `off` are text"
    if isinstance(given, str) and kinds & {"int_type", "float_type"} and re.fullmatch(NUMBER, given):
        return f"write {given} without quotes"
    if not isinstance(given, list) and "list_type" in kinds and "literal_error" not in kinds:
        return f"write [{given}]" if isinstance(given, str) else "put it in [ ]"
    return ""


def _unknown_key(path: KeyPath, data: Any) -> str:
    """What was probably meant: the key's own block first, then where it lives, then what others call it."""
    *_, name = path
    own = block_at(path[:-1], data).model_fields
    near = difflib.get_close_matches(str(name), own, n=1, cutoff=0.75)
    homes = dict.fromkeys(home for home in key_paths(Recipe) if home.rpartition(".")[2] == name)
    if near:
        return f"did you mean `{near[0]}`?"
    if name in ELSEWHERE_CALLED:
        return f"that is `{ELSEWHERE_CALLED[str(name)]}` here"
    if 0 < len(homes) <= 3:
        return f"it belongs to another block: `{'` or `'.join(homes)}`"
    return f"known here: {', '.join(own)}"


def _other_home(path: KeyPath, detail: ErrorDetails) -> str:
    """Of a loss that this workflow does not have: the workflows that do."""
    kind, field = detail.get("ctx", {}).get("unknown"), Recipe.model_fields["workflow"]
    if kind is None or path[0] != "workflow":
        return ""
    ((choice, base),) = parts(field.annotation, field.metadata)
    assert choice is not None
    fields = {name: choice.find(base, name).model_fields.get(str(path[-1])) for name in choice.types()}
    homes = [name for name, found in fields.items() if found is not None and _can_hold(found, kind)]
    return f"it belongs to `workflow: {{type: {' or '.join(homes)}}}`" if homes else ""


def _can_hold(field: FieldInfo, kind: str) -> bool:
    return any(choice is not None and kind in choice.types() for choice, _ in parts(field.annotation, field.metadata))


def _first_sentence(field: FieldInfo) -> str:
    return (field.description or "").split(". ")[0].split("\n")[0].rstrip(".")


def parts(annotation: Any, marks: tuple[Any, ...] | list[Any] = ()) -> Iterator[tuple[OneOf | None, Any]]:
    """The blocks a field can hold: (the choice, its base class), or (None, a fixed Config class)."""
    choice = next((mark for mark in marks if isinstance(mark, OneOf)), None)
    if choice is not None:
        yield choice, annotation
    elif get_origin(annotation) is Annotated:
        inner, *inner_marks = get_args(annotation)
        yield from parts(inner, inner_marks)
    elif isinstance(annotation, type) and issubclass(annotation, Config):
        yield None, annotation
    else:
        for inner in get_args(annotation):
            yield from parts(inner)


def block_at(path: KeyPath, data: Any) -> type[Config]:
    """The class that the block of a recipe at `path` is validated by; `data` is the whole recipe."""
    block: type[Config] = Recipe
    choice, base = cast(OneOf | None, None), cast(Any, Recipe)
    for key in path:
        data = data[key]
        if isinstance(key, str):
            field = block.model_fields[key]
            choice, base = next(parts(field.annotation, field.metadata))
        if isinstance(data, Mapping):
            block = base if choice is None else choice.find(base, data.get("type", choice.default))
    return block


def key_paths(block: type[Config], prefix: str = "") -> Iterator[str]:
    """Every key a recipe can have, built-in choices included: `model.adapter.r`."""
    for name, field in block.model_fields.items():
        yield prefix + name
        for choice, base in parts(field.annotation, field.metadata):
            blocks = [base] if choice is None else [choice.find(base, kind) for kind in choice.types()]
            for inner in blocks:
                yield from key_paths(inner, f"{prefix}{name}.")
