"""What the tests of row formats share."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from burnish.data.formats import Completion, Conversation, Part, Text, parts
from burnish.errors import DataError
from burnish.types import Row, RowFormat

USER = {"role": "user", "content": "2+2?"}
GOOD = {"role": "assistant", "content": "4"}
BAD = {"role": "assistant", "content": "5"}


def context(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "train": False}


def parsed(record: dict[str, Any], row_format: RowFormat) -> list[Part]:
    """The parts of a row, which must be left as it was."""
    before = copy.deepcopy(record)
    found = parts(Row(record, "set.jsonl:17"), row_format)
    assert record == before, "the row was changed"
    return found


def refusal(record: dict[str, Any], row_format: RowFormat) -> DataError:
    with pytest.raises(DataError) as caught:
        parsed(record, row_format)
    assert caught.value.where == "set.jsonl:17" and caught.value.cure
    return caught.value


def said(part: Part) -> list[dict[str, Any]] | tuple[str, str] | str:
    """Messages, (prompt, completion) or text."""
    content = part.content
    if isinstance(content, Conversation):
        return content.messages
    if isinstance(content, Completion):
        return content.prompt, content.completion
    assert isinstance(content, Text)
    return content.text
