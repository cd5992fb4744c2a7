"""1 where a completion is JSON that a schema allows, else 0."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval

from burnish.errors import DataError
from burnish.rewards.base import LiveReward, Reward
from burnish.rewards.completions import extracted, final_text

_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL)


class JsonSchema(Reward):
    """Parses the policy's last words, or the last fenced block in them, and validates it."""

    type: Literal["json_schema"] = "json_schema"
    against: dict[str, Any] | str
    """The schema, or the path of a file that holds it. Only what it holds itself is referred to; nothing is fetched."""
    parsed_value: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """What a completion gets that is JSON, but not such as the schema allows."""

    def open(self) -> LiveReward:
        try:
            from jsonschema import SchemaError
            from jsonschema.validators import validator_for
            from referencing import Registry
        except ImportError as error:
            cure = "pip install 'burnish[rewards]'"
            raise DataError("the package `jsonschema` is not installed", "json_schema", cure) from error
        schema, where = self._schema()
        kind = validator_for(schema)
        try:
            kind.check_schema(schema)
        except SchemaError as error:
            place = ".".join(map(str, error.absolute_path)) or "its root"
            raise DataError(f"not a JSON schema: at {place}, {error.message}", where, "correct the schema") from error
        validator = kind(schema, registry=Registry())

        def scores(prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[float]:
            return [self._score(final_text(completion), validator) for completion in completions]

        return scores

    def _schema(self) -> tuple[dict[str, Any], str]:
        if isinstance(self.against, dict):
            return self.against, "against"
        try:
            schema = json.loads(Path(self.against).expanduser().read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"cannot be read: {error}", self.against, "name a file that holds a JSON schema") from error
        if not isinstance(schema, dict):
            raise DataError(f"holds a {type(schema).__name__}, not a schema", self.against, "a schema is an object")
        return schema, self.against

    def _score(self, text: str, validator: Any) -> float:
        fenced = extracted(text, _FENCED)
        try:
            value = json.loads(text if fenced is None else fenced, parse_constant=_refuse)
            return 1.0 if validator.is_valid(value) else self.parsed_value
        except (ValueError, RecursionError):  # not JSON, or nested beyond what anybody would accept
            return 0.0


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
