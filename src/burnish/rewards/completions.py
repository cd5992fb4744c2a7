"""What built-in rewards read of a completion: its last words, the answer in them, and columns of the row."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from burnish.errors import DataError


def final_text(completion: Any) -> str:
    """What the policy said last, as text.

    >>> final_text("4"), final_text([{"role": "assistant", "content": "4"}]), final_text(["tt0111161", "tt0068646"])
    ('4', '4', 'tt0111161 tt0068646')
    """
    if isinstance(completion, str):
        return completion
    if all(isinstance(item, str) for item in completion):
        return " ".join(completion)
    said = [message for message in completion if message.get("role", "assistant") == "assistant"]
    content = said[-1].get("content") if said else None
    if isinstance(content, list):  # parts: only text is read
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def extracted(text: str, pattern: re.Pattern[str] | None) -> str | None:
    """The answer in a text: the first group of the last match, or the whole match without groups; None: no match.
    Without a pattern, all of it. Stripped.

    >>> extracted("<answer>3</answer> no, <answer> 4 </answer>", re.compile("<answer>(.*?)</answer>"))
    '4'
    """
    if pattern is None:
        return text.strip()
    last = None
    for match in pattern.finditer(text):
        last = match
    if last is None:
        return None
    return ((last[1] if pattern.groups else last[0]) or "").strip()  # a group may have no part in the match


def values_of(columns: dict[str, Sequence[Any]], name: str) -> Sequence[Any]:
    """A column of the rows. Raises DataError: they have none of this name."""
    if name in columns:
        return columns[name]
    near = difflib.get_close_matches(name, columns, n=1)
    known = ", ".join(sorted(columns))
    cure = f"did you mean '{near[0]}'?" if near else "name it in the reward, or rename one in the source's `columns`"
    raise DataError(f"the rows have no column '{name}'; there are {known}", cure=cure)
