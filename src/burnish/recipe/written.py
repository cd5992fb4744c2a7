"""A recipe as it was written: plain data from YAML 1.2 and overrides, and the place of every key.

YAML is composed by ruamel.yaml and turned into data here, because the places are wanted and little of YAML is: text,
numbers, booleans, null, lists and blocks. `on` and `yes` are text, `010` is ten, `1e-4` is a number, a date is text.
Keys given twice, tags, merge keys and files that unfold without end are refused.

This module must not know the schema.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from burnish.errors import RecipeError, UserError

KeyPath = tuple[str | int, ...]

MAX_VALUES = 10_000
"""Values a recipe may unfold to. Nine anchors that each name the one before nine times would be 10**9."""
MAX_DEPTH = 32
"""Blocks within blocks; also ends an anchor that contains itself."""


def dotted(path: KeyPath) -> str:
    """`data.train.0.path`: how key paths are shown, and written in overrides."""
    return ".".join(map(str, path))


class Written:
    """Data with places. `problems` are those of the writing itself: keys given twice, overrides that lead nowhere."""

    def __init__(self, text: str, name: str) -> None:
        """Reads YAML `text` of the file `name`. Raises RecipeError where there is no data to speak of."""
        self.problems: list[UserError] = []
        self._places: dict[KeyPath, str] = {}
        self._num_values = 0
        data = self._read(text, name, override="")
        if not isinstance(data, dict):
            reason = "the recipe is empty" if data is None else "a recipe is a block of keys"
            raise RecipeError((UserError(reason, where=name, cure="`burnish recipes ls` shows some to start from"),))
        self.data: dict[str, Any] = data

    def place(self, path: KeyPath) -> str:
        """`recipe.yaml:12` or `override 'num_steps=5'`: where the key, or the block it would be in, was written."""
        while path not in self._places:
            path = path[:-1]
        return self._places[path]

    def override(self, text: str) -> None:
        """Applies `key.path=value`; the value is YAML, and a block that is missing on the way is created.

        >>> written.override("data.packing={type: none}")
        >>> written.override("data.train.0.path=other.jsonl")
        """
        name = f"override '{_without_secrets(text)}'"
        keys, equals, value = text.partition("=")
        if not (equals and re.fullmatch(r"[\w-]+(\.[\w-]+)*", keys)):
            self.problems.append(UserError("not of the form key.path=value", where=name, cure="such as num_steps=20"))
            return
        path: tuple[Any, ...] = tuple(int(key) if key.isdecimal() else key for key in keys.split("."))
        holder: Any = self.data
        for depth, key in enumerate(path):
            if not _has_room(holder, key):
                self.problems.append(UserError(_leads_nowhere(holder, path[:depth], key), where=name))
                return
            if isinstance(holder, dict):
                holder.setdefault(key)
            elif key == len(holder):
                holder.append(None)
            if depth == len(path) - 1:
                break
            if holder[key] is None:
                holder[key] = [] if isinstance(path[depth + 1], int) else {}
                self._places[path[: depth + 1]] = name
            holder = holder[key]
        self._places = {p: place for p, place in self._places.items() if p[: len(path)] != path}
        try:
            holder[path[-1]] = self._read(value, name, override=name, path=path)
        except RecipeError as error:
            self.problems += error.problems

    def _read(self, text: str, name: str, *, override: str, path: KeyPath = ()) -> Any:
        try:
            node = YAML(typ="safe", pure=True).compose(text)
        except MarkedYAMLError as error:
            line = "" if override or error.problem_mark is None else f":{error.problem_mark.line + 1}"
            reason = " ".join(filter(None, (error.context, error.problem)))
            raise RecipeError((UserError(f"not YAML: {reason}", where=f"{name}{line}"),)) from None
        except (YAMLError, RecursionError) as error:
            raise RecipeError((UserError(f"not YAML: {error}", where=name),)) from None
        self._places[path] = name
        return None if node is None else self._value(node, path, name, override)

    def _value(self, node: Node, path: KeyPath, name: str, override: str) -> Any:
        place = override or f"{name}:{node.start_mark.line + 1}"
        self._places.setdefault(path, place)
        self._num_values += 1
        if self._num_values > MAX_VALUES or len(path) > MAX_DEPTH:
            limit = f"{MAX_DEPTH} blocks deep" if len(path) > MAX_DEPTH else f"{MAX_VALUES} values"
            raise RecipeError(
                (UserError(f"the recipe unfolds to more than {limit}; look at its anchors", where=place),)
            )
        if isinstance(node, SequenceNode):
            return [self._value(item, (*path, index), name, override) for index, item in enumerate(node.value)]
        if isinstance(node, MappingNode):
            return self._block(node, path, name, override)
        return self._scalar(node, path, place)

    def _block(self, node: MappingNode, path: KeyPath, name: str, override: str) -> dict[str, Any]:
        block: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = override or f"{name}:{key_node.start_mark.line + 1}"
            key = key_node.value
            if not isinstance(key_node, ScalarNode) or str(key_node.tag) not in ("tag:yaml.org,2002:str", _MERGE):
                shown = key if isinstance(key, str) else "a block"
                self.problems.append(UserError(f"{dotted((*path, shown))}: a key must be text", where=place))
            elif str(key_node.tag) == _MERGE:
                cure = "write the keys out; recipes have no inheritance"
                self.problems.append(UserError("merge keys (`<<`) are not YAML 1.2", where=place, cure=cure))
            elif key in block:
                first = self._places[(*path, key)]
                reason = f"{dotted((*path, key))}: given twice, first at {first}"
                self.problems.append(UserError(reason, where=place, cure="remove one"))
            else:
                self._places[(*path, key)] = place
                block[key] = self._value(value_node, (*path, key), name, override)
        return block

    def _scalar(self, node: Node, path: KeyPath, place: str) -> Any:
        text, kind = node.value, str(node.tag).removeprefix("tag:yaml.org,2002:")
        try:
            return _SCALARS[kind](text)
        except (KeyError, ValueError):
            self.problems.append(UserError(f"{dotted(path)}: cannot read {text!r} as {kind}", where=place))
            return text


def _has_room(holder: Any, key: str | int) -> bool:
    """One past a list's end counts: a recipe without `data.eval` then takes `data.eval.0.path=...`."""
    if isinstance(holder, list):
        return isinstance(key, int) and key <= len(holder)
    return isinstance(holder, dict) and isinstance(key, str)


def _without_secrets(text: str) -> str:
    """What is told of an override goes to logs: `s3://user:key@bucket?sig=1` is `s3://***@bucket?***` there."""
    return re.sub(r"://[^\s/@]+@", "://***@", re.sub(r"(://[^\s?]*)\?\S+", r"\1?***", text))


def _leads_nowhere(holder: Any, path: KeyPath, key: str | int) -> str:
    place = f"`{dotted(path)}`" if path else "the recipe"
    if isinstance(holder, list):
        return f"{place} is a list of {len(holder)}, numbered from 0; it has no `{key}`"
    if isinstance(holder, dict):
        return f"{place} is a block of keys, not a list; it has no `{key}`"
    return f"{place} is a value, not a block; it has no `{key}`"


_MERGE = "tag:yaml.org,2002:merge"


def _int(text: str) -> int:
    digits = text.replace("_", "").lower()
    return int(digits, 0 if digits.lstrip("+-").startswith(("0x", "0o", "0b")) else 10)


def _float(text: str) -> float:
    return float(re.sub(r"\.(inf|nan)$", r"\1", text.replace("_", "").lower()))


def _str(text: str) -> str:
    """JSON writes a character beyond U+FFFF as two escapes, which YAML leaves as two halves. One alone: ValueError."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16")


_SCALARS = {
    "null": lambda _: None,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "int": _int,
    "float": _float,
    "str": _str,
    "timestamp": str,
}


def read(path: Path) -> Written:
    """The recipe file at `path`. Raises RecipeError if it cannot be read or is not YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError((UserError(f"not UTF-8: {error}", where=str(path)),)) from None
    return Written(text, str(path))
