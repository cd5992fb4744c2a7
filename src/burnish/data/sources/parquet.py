"""Parquet files: rows in any order through their row groups, or forwards in batches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from burnish.data.sources._files import DataFile, find_files
from burnish.data.sources.base import RowShards, RowTable, Source
from burnish.errors import DataError
from burnish.types import Row

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

_CACHE_BYTES = 1 << 29
_BATCH_ROWS = 256


class Parquet(Source):
    """Parquet files. Decoded row groups are kept in memory up to 512 MiB, which shuffled reading of a larger set would
    decode over and over: give it `streaming`."""

    type: Literal["parquet"] = "parquet"
    path: str
    """A file, a folder of *.parquet, a glob such as `data/part-*.parquet`, or a URL that fsspec reads (`s3://...`)."""
    streaming: bool = False
    """Read forwards only, each file a shard: rows are shuffled in windows, and progress has no known end."""

    def open(self) -> RowTable | RowShards:
        files = find_files(self.path, ".parquet")
        table = ParquetTable(files, self.renamed)
        if not len(table):
            raise DataError("holds no row", where=self.path)
        return ParquetShards(files, self.renamed) if self.streaming else table


class ParquetTable:
    """Rows numbered through all files, in the files' order. Opening reads the footers only."""

    def __init__(
        self,
        files: list[DataFile],
        renamed: Callable[[dict[str, Any]], dict[str, Any]],
        cache_bytes: int = _CACHE_BYTES,
    ) -> None:
        self._renamed, self._cache_bytes = renamed, cache_bytes
        self._groups: list[tuple[DataFile, int, int]] = []
        """(file, row group in it, number of its first row in the file)"""
        sizes = []
        for file in files:
            with open_parquet(file) as parquet:
                first = 0
                for group in range(parquet.num_row_groups):
                    self._groups.append((file, group, first))
                    sizes.append(parquet.metadata.row_group(group).num_rows)
                    first += sizes[-1]
        self._row_ends = np.cumsum(sizes)
        self._starts = self._row_ends - sizes
        self._decoded: OrderedDict[int, pyarrow.Table] = OrderedDict()

    def __len__(self) -> int:
        return int(self._row_ends[-1]) if self._groups else 0

    def rows(self, indices: Sequence[int]) -> list[Row]:
        """The rows of these numbers, in this order; each row group is decoded at most once a call."""
        numbers = np.asarray(indices, np.int64)
        assert ((numbers >= 0) & (numbers < len(self))).all(), f"row numbers outside 0..{len(self)}"
        which = np.searchsorted(self._row_ends, numbers, side="right")
        found: dict[int, Row] = {}
        for g in np.unique(which):
            positions = np.flatnonzero(which == g)
            within = numbers[positions] - self._starts[g]
            file, _, first = self._groups[g]
            records = self._decode(int(g)).take(within).to_pylist()
            for position, row, record in zip(positions, within, records, strict=True):
                where = f"{file.path}:row {first + row}"
                found[int(position)] = Row(self._renamed(plain(record)), where)
        return [found[position] for position in range(len(numbers))]

    def _decode(self, g: int) -> pyarrow.Table:
        if g not in self._decoded:
            file, group, _ = self._groups[g]
            with open_parquet(file) as parquet:
                self._decoded[g] = parquet.read_row_group(group)
            while len(self._decoded) > 1 and sum(table.nbytes for table in self._decoded.values()) > self._cache_bytes:
                self._decoded.popitem(last=False)
        self._decoded.move_to_end(g)
        return self._decoded[g]


class ParquetShards:
    """Files read forwards, each one a shard."""

    def __init__(self, files: list[DataFile], renamed: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._files, self._renamed = files, renamed
        self.num_shards = len(files)

    def read(self, shard: int, start: int) -> Iterator[Row]:
        """Rows of one file from its row number `start` on; whole row groups before that are not decoded."""
        file = self._files[shard]
        with open_parquet(file) as parquet:
            row, groups = 0, []
            for group in range(parquet.num_row_groups):
                size = parquet.metadata.row_group(group).num_rows
                if groups or row + size > start:
                    groups.append(group)
                else:
                    row += size
            for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups):
                skipped = min(max(start - row, 0), batch.num_rows)
                for number, record in enumerate(batch.slice(skipped).to_pylist(), row + skipped):
                    yield Row(self._renamed(plain(record)), f"{file.path}:row {number}")
                row += batch.num_rows


@contextmanager
def open_parquet(file: DataFile) -> Iterator[pyarrow.parquet.ParquetFile]:
    """A file's footer and pages. What pyarrow finds broken in them, now or while reading, is a DataError."""
    import pyarrow
    import pyarrow.parquet

    try:
        with file.open() as handle, pyarrow.parquet.ParquetFile(handle) as parquet:
            yield parquet
    except (pyarrow.ArrowException, OSError) as error:
        cure = "check that the file is Parquet and was written to its end"
        raise DataError(f"cannot be read as Parquet: {error}", file.path, cure) from error


def plain(value: Any) -> Any:
    """What a JSON file would hold instead: objects without null fields, and dates as text.

    Arrow fills in every field that any row has: {"role": "user", "content": "hi", "tool_calls": None} becomes
    {"role": "user", "content": "hi"}. A null that somebody wrote on purpose cannot be told from that, and goes too.
    """
    if value is None or isinstance(value, str | int | float | bytes):
        return value
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items() if item is not None}
    return [plain(item) for item in value] if isinstance(value, list) else str(value)
