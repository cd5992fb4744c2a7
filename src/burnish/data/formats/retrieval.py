"""Queries with what answers them, for search.

Accepted: `query` (or `anchor`) and `positive`, strings; `negative`, a string or a list of them, for what looks like an
answer and is none. A row may add `weight`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from burnish.data.formats.base import Part, Text, text_of, weight_of, wrong_kind
from burnish.data.messages import DROP_ROW, Refused

if TYPE_CHECKING:
    from burnish.types import RowFormat

QUERY, POSITIVE, NEGATIVE = 0.0, 1.0, 2.0


def parts(record: dict[str, Any], _: RowFormat) -> list[Part]:
    """Query, positive, negatives; the column `role` says which is which."""
    query = record.get("anchor") if record.get("query") is None else record["query"]
    if query is None and record.get("positive") is None:
        raise wrong_kind(record, "retrieval", "query and positive, and negative where there are some")
    negatives = record.get("negative")
    negatives = negatives if isinstance(negatives, list) else [] if negatives is None else [negatives]
    written = [("query", query, QUERY), ("positive", record.get("positive"), POSITIVE)]
    written += [("negative", negative, NEGATIVE) for negative in negatives]
    weight = weight_of(record)
    found = []
    for name, value, role in written:
        if value is None or (isinstance(value, str) and not value.strip()):
            raise Refused(f"{name}: is {'missing' if value is None else 'empty'}", DROP_ROW)
        found.append(Part(Text(text_of(value, name), weight), {"role": role}, name, trains=False))
    if any(part.content == found[1].content for part in found[2:]):
        raise Refused("the positive is among the negatives", "remove it from `negative`, or remove the row")
    return found
