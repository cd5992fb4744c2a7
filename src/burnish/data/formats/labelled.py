"""Any conversation, completion or text with labels: a class, or a number, for each thing that a head says of it.

A label stands in a column of its name, or in `labels: {name: value}`. A class is written by name or by index; null or
absent: this row has no such label, and the column is NaN.
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
    if isinstance(value, str) and value in classes:
        return float(classes.index(value))
    if isinstance(value, int | float) and value in range(len(classes)):
        return float(value)
    known = ", ".join(f"{index}: {label}" for index, label in enumerate(classes))
    raise Refused(f"{name}: {shown(value)} is none of the classes {known}", "write a class by its name or its index")
