"""Any conversation, completion or text with labels: a class, or a number, for each thing that a head says of it.

A label stands in a column of its name, or in `labels: {name: value}`. A class is written by name (also as a number or a
truth value: 3 is the class "3", true is "true") or by index, unless classes are called by numbers, which are no indices
then. Null or absent: this row has no such label, and the column is NaN.
"""

from __future__ import annotations

from math import nan
from typing import TYPE_CHECKING, Any

from burnish.data.formats.base import Part, number
from burnish.data.formats.conversations import said
from burnish.data.messages import Refused, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from burnish.types import RowFormat


def parts(record: dict[str, Any], row_format: RowFormat) -> list[Part]:
    """One document with its labels."""
    content = said(record)
    together = record.get("labels")
    together = together if isinstance(together, dict) else {}
    columns = {}
    for name, classes in row_format.labels.items():
        value = record.get(name)
        value = together.get(name) if value is None else value
        columns[name] = nan if value is None else _label(value, name, classes)
    if all(value != value for value in columns.values()):
        names = " or ".join(columns)
        raise Refused(f"{names}: is missing, so there is nothing to learn", "fill it in, or remove the row")
    return [Part(content, columns, trains=False)]


def _label(value: Any, name: str, classes: Sequence[str]) -> float:
    if not classes:
        return float(value) if isinstance(value, bool) else number(value, name)
    by_index = not any(label.isdecimal() for label in classes)
    if isinstance(value, bool):
        lower = [label.lower() for label in classes]
        value = classes[lower.index(str(value).lower())] if str(value).lower() in lower else int(value)
    if isinstance(value, str | int | float):
        spelt = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
        if spelt in classes:
            return float(classes.index(spelt))
        if by_index and not isinstance(value, str) and value in range(len(classes)):
            return float(value)
    known = ", ".join(f"{index}: {label}" if by_index else label for index, label in enumerate(classes))
    cure = "write a class by its name" + " or its index" * by_index
    raise Refused(f"{name}: {shown(value)} is none of the classes {known}", cure)
