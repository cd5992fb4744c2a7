"""New tokens: what is refused, and where it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from burnish.data.tokenizers.added import AddTokens
from burnish.data.tokenizers.vocabulary import Vocabulary
from burnish.errors import DataError
from tests.chat_helpers import byte_level


@pytest.mark.parametrize(
    ("name", "text", "line", "reason"),
    [
        ("t.json", '[["<a>"]]', "", "a new token or its text is not a string"),
        ("t.json", '{"<a>": 3}', "", "a new token or its text is not a string"),
        ("t.json", '["<a>", "<a>"]', "", "'<a>' is listed twice"),
        ("t.json", "[]", "", "there is no new token"),
        ("t.json", "[", "", "the file of new tokens is not JSON"),
        ("t.txt", "", "", "there is no new token"),
        ("t.txt", "<a>\n\n<b>\n", ":2", "a new token is empty"),
        ("t.txt", "<a>\n<b>\n<a>\n", ":3", "'<a>' is listed twice"),
    ],
)
def test_a_bad_file_is_refused_at_its_place(tmp_path: Path, name: str, text: str, line: str, reason: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(DataError) as refused:
        AddTokens(file=str(file)).extend(byte_level())
    assert refused.value.where == f"{file}{line}" and reason in refused.value.reason


@pytest.mark.parametrize(("tokens", "reason"), [([], "there is no new token"), (["<a>", "<a>"], "is listed twice")])
def test_a_bad_list_is_refused(tokens: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as refused:
        AddTokens(tokens=tokens).extend(byte_level())
    assert refused.value.where == "data.tokenizer.add_tokens.tokens"


def test_a_vocabulary_of_items_is_not_extended(tmp_path: Path) -> None:
    (tmp_path / "items.txt").write_text("a\nb\n")
    tokenizer = Vocabulary(items=str(tmp_path / "items.txt")).open(None)
    with pytest.raises(DataError, match="a vocabulary of items takes no new tokens"):
        AddTokens(tokens=["c"]).extend(tokenizer)
