"""Components: one frozen pydantic model that is schema, documentation and behaviour, found by its folder.

A field `loss: Annotated[Loss, OneOf("burnish.losses")]` accepts `{type: nll, ...}`. The type names a file: `nll` is the
one `Loss` subclass of `burnish/losses/nll.py` that declares `type: Literal["nll"] = "nll"`. Only that file is imported,
so a recipe never pays for the choices it did not make. A type with a colon, `my_module:MyLoss`, names a class of the
user's own; it is validated the same way and comes back from the saved recipe.

This module must not know any component.
"""

from __future__ import annotations

import difflib
import importlib
import itertools
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema, to_json


class Config(BaseModel):
    """A frozen part of the recipe. Unknown keys are refused; the string under a field is its documentation.

    Strict: `"12"`, `1.0` and `true` are not integers, `"yes"` is not a bool, no number is infinite. Only an integer may
    stand for a float: `lora_alpha: 32`.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )


class Component(Config):
    """A part with behaviour, chosen by `type`. A built-in narrows the field: `type: Literal["nll"] = "nll"`."""

    type: str
    """Name of the file in this component's folder, or `module:Class` for a class of your own."""


@dataclass(frozen=True, slots=True)
class Free:
    """Marks a recipe field that may differ when a run is resumed: `run_dir: Annotated[str, Free()]`.

    Every other field is fixed: changing it would change the losses, so the resume is refused with the difference shown.
    """

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "resume": "free"}


def fixed_view(config: Config, data: Mapping[str, Any]) -> dict[str, Any]:
    """`data`, plain data of a part like `config`, without the fields that `config` marks free, at any depth."""
    view = {}
    for name, value in data.items():
        field = type(config).model_fields.get(name)
        if field is None or not any(isinstance(mark, Free) for mark in field.metadata):
            view[name] = _fixed(getattr(config, name, None), value)
    return view


def _fixed(part: Any, value: Any) -> Any:
    if isinstance(part, Config) and isinstance(value, Mapping):
        return fixed_view(part, value)
    if isinstance(part, list) and isinstance(value, list):
        return [_fixed(inner, item) for inner, item in itertools.zip_longest(part[: len(value)], value)]
    return value


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """One line for each leaf that differs between two trees of plain data.

    >>> differences({"data": {"max_length": 512}}, {"data": {"max_length": 1024}})
    ['data.max_length: 512 -> 1024']
    """
    if isinstance(old, list) and isinstance(new, list):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in [*old, *(key for key in new if key not in old)]:
            here = f"{path}.{key}" if path else str(key)
            lines += differences(old.get(key, _ABSENT), new.get(key, _ABSENT), here)
        return lines
    return [] if old == new else [f"{path}: {_shown(old)} -> {_shown(new)}"]


_ABSENT = object()


def _shown(value: Any) -> str:
    return "(absent)" if value is _ABSENT else to_json(value).decode()


C = TypeVar("C", bound=Component)


def unfit(reason: str, cure: str, *keys: str | int) -> PydanticCustomError:
    """What a validator of a block raises where parts of it do not fit together.

    Args:
        keys: path within the block to the key that is at fault; none: the whole block.
    """
    return PydanticCustomError("unfit", "{reason}: {cure}", {"reason": reason, "cure": cure, "keys": keys})


@dataclass(frozen=True, slots=True)
class OneOf:
    """Annotation: the field holds one component of `package`, chosen by `type`; without it, `default`.

    >>> LOSSES = OneOf("burnish.losses", default="nll")
    >>> class SFT(Workflow):
    ...     loss: Annotated[Loss, LOSSES] = LOSSES.field(Loss)
    """

    package: str
    default: str | None = None
    without: tuple[str, ...] = ()
    """Types of the package that may not stand here: a part cannot be made of parts of its own type."""

    def __get_pydantic_core_schema__(self, base: type[Component], _handler: GetCoreSchemaHandler) -> CoreSchema:
        def validate(value: Any) -> Component:
            if isinstance(value, base):
                return value
            if not isinstance(value, Mapping):
                likely = value if value in self.types() else self.default or self.types()[0]
                raise PydanticCustomError(
                    "component", "expected a block such as {example}", {"example": f"{{type: {likely}}}"}
                )
            name = value.get("type", self.default)
            if name is None:
                raise PydanticCustomError(
                    "component", "the key `type` is missing; one of: {known}", {"known": self._listed()}
                )
            # A ValidationError raised here is merged by pydantic: its locations are prefixed by this field's.
            # As JSON, because strict mode then still makes a tuple or a Path of what a recipe can hold.
            return self.find(base, name).model_validate_json(to_json(value, inf_nan_mode="constants"))

        dump = core_schema.plain_serializer_function_ser_schema(_dump, info_arg=True)
        return core_schema.no_info_plain_validator_function(validate, serialization=dump, metadata={"one_of": base})

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        base = schema["metadata"]["one_of"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
        choices = [handler(self.find(base, name).__pydantic_core_schema__) for name in self.types()]
        own = {
            "title": "a class of your own",
            "type": "object",
            "required": ["type"],
            "properties": {"type": {"type": "string", "pattern": r"^[\w.]+:\w+$"}},
        }
        return {"anyOf": [*choices, own]}

    def field(self, base: type[C]) -> Any:
        """A pydantic field whose default is `default` with its own defaults; imported only if needed."""
        return Field(default_factory=lambda: self.find(base, self.default).model_validate({}))

    def types(self) -> list[str]:
        """Names of the built-in choices, sorted: the folder's files that declare themselves as one; none is imported.

        A helper may stand beside them: it has no line `type: Literal["<its name>"]`.
        """
        folder = importlib.import_module(self.package).__path__
        files = (Path(place, f"{module.name}.py") for place in folder for module in pkgutil.iter_modules([place]))
        found = (f.stem for f in files if f.is_file() and f'type: Literal["{f.stem}"]' in f.read_text("utf-8"))
        return sorted(name for name in found if name not in self.without)

    def find(self, base: type[C], name: Any) -> type[C]:
        """The class that `type: name` stands for.

        Raises:
            PydanticCustomError: no such choice, or the user's class cannot be imported or is not a `base`.
        """
        if isinstance(name, str) and ":" in name:
            return _users_class(base, name)
        if name not in self.types():
            near = difflib.get_close_matches(str(name), self.types(), n=1)
            raise PydanticCustomError(
                "component",
                "no type '{name}'{hint}; one of: {known}",
                {
                    "name": str(name),
                    "hint": f", did you mean '{near[0]}'?" if near else "",
                    "known": self._listed(),
                    "unknown": str(name),
                },
            )
        module = importlib.import_module(f"{self.package}.{name}")
        for candidate in vars(module).values():
            if isinstance(candidate, type) and issubclass(candidate, base) and candidate.__module__ == module.__name__:
                field = candidate.model_fields["type"]
                if field.default == name:
                    return candidate
        raise AssertionError(f'{module.__file__} has no {base.__name__} with `type: Literal["{name}"] = "{name}"`')

    def _listed(self) -> str:
        return ", ".join([*self.types(), "module:Class"])


def _dump(value: Component, info: core_schema.SerializationInfo) -> dict[str, Any]:
    return value.model_dump(mode=info.mode)


def _users_class(base: type[C], name: str) -> type[C]:
    module_name, _, class_name = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # the module is the user's, and half written as often as not: a SyntaxError, a NameError
        raise PydanticCustomError(
            "component",
            "cannot import '{name}': {kind}: {error}; a module beside the recipe or in the current folder is found",
            {"name": name, "kind": type(error).__name__, "error": str(error)},
        ) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise PydanticCustomError(
            "component",
            "'{name}' is not a subclass of {base}",
            {"name": name, "base": f"{base.__module__}.{base.__name__}"},
        )
    return found
