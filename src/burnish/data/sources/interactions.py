"""Tables of interactions, one event a line, read forwards: CSV, TSV, RecBole's `.inter`, JSON lines and Parquet.

Owns how such files are written and what their columns are called. Knows neither users nor vocabularies.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from burnish.data.sources._files import DataFile
from burnish.data.sources.jsonl import parse_line
from burnish.data.sources.parquet import open_parquet, plain
from burnish.errors import DataError

ALIASES = {"user_id": "user", "item_id": "item"}
"""What most tables call the two columns that every event needs."""
_DELIMITERS = {".csv": ",", ".tsv": "\t", ".inter": "\t"}
_TYPED = re.compile(r"(.+):(?:token|token_seq|float|float_seq)")
_RENAME = "name the columns in `columns: {<the file's name>: item}`"


def read_events(
    file: DataFile, renamed: Callable[[dict[str, Any]], dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], int]]:
    """(event, line) of a table, under Burnish's names: `user`, `item`, `timestamp`, and whatever else it has.

    Raises:
        DataError: at the file and line, with reason and cure.
    """
    suffix = "." + file.path.rpartition(".")[2].lower()
    if suffix in _DELIMITERS:
        rows = _read_delimited(file, _DELIMITERS[suffix])
    elif suffix == ".jsonl":
        rows = _read_jsonl(file)
    elif suffix == ".parquet":
        rows = _read_parquet(file)
    else:
        known = ", ".join([*_DELIMITERS, ".jsonl", ".parquet"])
        raise DataError(f"a table of events ends in one of {known}", file.path, "convert it, or rename it")
    for record, line in rows:
        yield named(renamed(record)), line


def place(file: DataFile, line: int) -> str:
    """`table.csv:17`; rows of a Parquet file are counted from 0: `table.parquet:row 16`."""
    return f"{file.path}:row {line}" if file.path.endswith(".parquet") else f"{file.path}:{line}"


def named(record: dict[str, Any]) -> dict[str, Any]:
    """`record` with the usual names of users and items in place of their aliases."""
    for theirs, ours in ALIASES.items():
        if theirs in record and ours not in record:
            record = {ours if name == theirs else name: value for name, value in record.items()}
    return record


def identifier(record: dict[str, Any], column: str, where: str) -> str:
    """A user's or an item's id as text: 242, 242.0 and "242" are one item.

    Raises:
        DataError: there is none, or it is not a string or a number.
    """
    if column not in record:
        raise DataError(f"no column `{column}`; there are {', '.join(record) or 'none'}", where, _RENAME)
    text = spelled(record[column])
    if not text:
        raise DataError(f"{column}: {record[column]!r} is not an id", where, "an id is a string or a whole number")
    return text


def spelled(value: Any) -> str:
    """A string or number as it stands in a token, '' for anything else: 4.0 is `4`."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return str(int(value)) if value == value // 1 else str(value)


def moment(value: Any, where: str) -> float:
    """Seconds (or whatever the table counts in) of a timestamp: a number, or a date and time in ISO 8601, in UTC where
    it names no zone, so that all machines agree.

    Raises:
        DataError: it is neither.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        try:
            written = datetime.fromisoformat(value)
            number = (written if written.tzinfo else written.replace(tzinfo=UTC)).timestamp()
        except (TypeError, ValueError):
            number = float("nan")
    if number != number:
        raise DataError(f"timestamp: {value!r} is not a time", where, "write a number, or ISO 8601: 2024-05-01 12:30")
    return number


def _read_delimited(file: DataFile, delimiter: str) -> Iterator[tuple[dict[str, Any], int]]:
    # Tabs need no quoting, and titles in `.inter` files hold quotation marks that mean themselves.
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    with file.open() as handle, io.TextIOWrapper(handle, "utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, quoting=quoting)
        try:
            header = [match[1] if (match := _TYPED.fullmatch(name)) else name for name in next(reader, [])]
            for row in reader:
                if len(row) == len(header):
                    yield dict(zip(header, row, strict=True)), reader.line_num
                elif row:
                    reason = f"{len(row)} columns, the header has {len(header)}: {', '.join(header)}"
                    raise DataError(reason, place(file, reader.line_num), "fix or remove the line")
        except (csv.Error, UnicodeDecodeError) as error:
            where = place(file, reader.line_num + 1)
            raise DataError(
                f"cannot be read: {error}", where, "write it as UTF-8 text with one event a line"
            ) from error


def _read_jsonl(file: DataFile) -> Iterator[tuple[dict[str, Any], int]]:
    with file.open() as handle:
        for line, text in enumerate(handle, 1):
            if not text.isspace():
                yield parse_line(text, place(file, line)), line


def _read_parquet(file: DataFile) -> Iterator[tuple[dict[str, Any], int]]:
    with open_parquet(file) as parquet:
        row = 0
        for batch in parquet.iter_batches():
            for record in batch.to_pylist():
                yield plain(record), row
                row += 1
