"""JSON lines: one object a line, read in any order through an index of line starts, or forwards without one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, Literal

import numpy as np

from burnish.data.sources._files import DataFile, find_files
from burnish.data.sources.base import RowShards, RowTable, Source
from burnish.errors import DataError
from burnish.types import Row

_PIECE_BYTES = 1 << 22
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ONE_A_LINE = "write one JSON object a line; a file that is one JSON list converts with `jq -c '.[]'`"


class JsonLines(Source):
    """One JSON object a line, in UTF-8. Blank lines are skipped. Opening reads the files once to index their lines, at
    8 bytes a line; with `streaming` nothing is read ahead and each file is one shard."""

    type: Literal["jsonl"] = "jsonl"
    path: str
    """A file, a folder of *.jsonl, a glob such as `data/part-*.jsonl`, or a URL that fsspec reads (`s3://...`)."""
    streaming: bool = False
    """Read forwards only, for sets too large to index: rows are shuffled in windows, and progress has no known end."""

    def open(self) -> RowTable | RowShards:
        files = find_files(self.path, ".jsonl")
        if self.streaming:
            shards = JsonlShards(files, self.renamed)
            if not any(True for shard in range(shards.num_shards) for _ in shards.read(shard, 0)):
                raise DataError("holds no row", where=self.path)
            return shards
        table = JsonlTable(files, self.renamed)
        if not len(table):
            raise DataError("holds no row", where=self.path)
        return table


class JsonlTable:
    """Rows of indexed files, numbered through all of them in the files' order."""

    def __init__(self, files: list[DataFile], renamed: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._files, self._renamed = files, renamed
        self._indices: list[tuple[np.ndarray, np.ndarray | range]] = []
        for file in files:
            with file.open() as handle:
                self._indices.append(index_lines(handle))
        self._row_ends = np.cumsum([len(lines) for _, lines in self._indices])

    def __len__(self) -> int:
        return int(self._row_ends[-1])

    def rows(self, indices: Sequence[int]) -> list[Row]:
        """The rows of these numbers, in this order. Raises DataError naming file and line."""
        numbers = np.asarray(indices, np.int64)
        assert ((numbers >= 0) & (numbers < len(self))).all(), f"row numbers outside 0..{len(self)}"
        which = np.searchsorted(self._row_ends, numbers, side="right")
        found: dict[int, Row] = {}
        for f in np.unique(which):
            file, (offsets, lines) = self._files[f], self._indices[f]
            positions = np.flatnonzero(which == f)
            first = self._row_ends[f] - len(lines)
            here = [int(lines[row]) for row in numbers[positions] - first]
            texts = file.read_ranges([int(offsets[line]) for line in here], [int(offsets[line + 1]) for line in here])
            for position, line, text in zip(positions, here, texts, strict=True):
                where = f"{file.path}:{line + 1}"
                found[int(position)] = Row(self._renamed(parse_line(text, where)), where)
        return [found[position] for position in range(len(numbers))]


class JsonlShards:
    """Files read forwards, each one a shard."""

    def __init__(self, files: list[DataFile], renamed: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._files, self._renamed = files, renamed
        self.num_shards = len(files)

    def read(self, shard: int, start: int) -> Iterator[Row]:
        """Rows of one file from its row number `start` on; rows before that are passed over without being parsed."""
        file, row = self._files[shard], 0
        with file.open() as handle:
            for line, text in enumerate(handle, 1):
                if text.isspace():
                    continue
                if row >= start:
                    where = f"{file.path}:{line}"
                    yield Row(self._renamed(parse_line(text, where)), where)
                row += 1


def index_lines(handle: IO[bytes], piece_bytes: int = _PIECE_BYTES) -> tuple[np.ndarray, np.ndarray | range]:
    """Where the lines of a file are, in one pass: (byte offsets int64 [L + 1], the lines that are rows, from 0).

    Line l is bytes offsets[l]..offsets[l + 1], its newline included. For b"{}\\n\\n{}" that is ([0, 3, 4, 6], [0, 2]).
    """
    starts, suspects = [np.zeros(1, np.int64)], []
    size = num_starts = 0
    at_start = True
    while piece := handle.read(piece_bytes):
        text = np.frombuffer(piece, np.uint8)
        after = np.flatnonzero(text == ord("\n")) + 1
        begins = np.concatenate([np.zeros(int(at_start), np.int64), after])
        at_start = len(begins) > 0 and bool(begins[-1] == len(piece))
        first_bytes = text[begins[:-1] if at_start else begins]
        # A line that begins with white space may be blank; only these are looked at again.
        suspects.append(np.flatnonzero(first_bytes <= ord(" ")) + num_starts)
        num_starts += len(first_bytes)
        starts.append(after + size)
        size += len(piece)
    offsets = np.concatenate(starts)
    if offsets[-1] != size:
        offsets = np.append(offsets, size)
    blank = [line for line in np.concatenate(suspects or [offsets[:0]]) if _is_blank(handle, offsets, line)]
    num_lines = len(offsets) - 1
    return offsets, np.delete(np.arange(num_lines), blank) if blank else range(num_lines)


def _is_blank(handle: IO[bytes], offsets: np.ndarray, line: int) -> bool:
    handle.seek(int(offsets[line]))
    return handle.read(int(offsets[line + 1] - offsets[line])).isspace()


def parse_line(line: bytes, where: str) -> dict[str, Any]:
    """The object on a line. Raises DataError at `where`, saying what is wrong with it."""
    try:
        record = json.loads(line.removeprefix(_BYTE_ORDER_MARK).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        if not line.endswith(b"\n"):
            reason = f"the last line is cut short: it has no newline and is not whole JSON ({_json_reason(error)})"
            raise DataError(reason, where, "write the file again, or remove its last line") from error
        if isinstance(error, UnicodeDecodeError):
            cure = "convert the file to UTF-8, for example with `iconv -f latin1 -t utf-8`"
            raise DataError(_json_reason(error), where, cure) from error
        cure = _ONE_A_LINE if line.lstrip().startswith((b"[", b"]", b"}")) else "fix or remove the line"
        raise DataError(f"bad JSON: {_json_reason(error)}", where, cure) from error
    if not isinstance(record, dict):
        raise DataError(f"the line holds a {type(record).__name__}, not an object", where, _ONE_A_LINE)
    return record


def _json_reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.object[error.start]:#04x} at column {error.start + 1} is not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {min(error.pos, len(error.doc.rstrip())) + 1}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
