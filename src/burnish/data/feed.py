"""Rows of one source in the run's order: tables by permutation, streamed shards by shuffled windows.

A place in the order is a few integers, so nothing is replayed on resume. This module knows rows by number; what is in
them is the renderer's business, and which source comes next is `mix.py`'s.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from burnish.data.mix import permutation_keys, permute
from burnish.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from burnish.data.sources.base import RowShards, RowTable
    from burnish.types import Row

WINDOW = 1024
"""Rows of a streamed shard that one lane shuffles together; this many rows a lane are held in memory."""

A = TypeVar("A")
B = TypeVar("B")


class Ref(NamedTuple):
    """One row of the run's sources: all that a checkpoint keeps of a sample."""

    source: int
    shard: int
    row: int


class Cursor(NamedTuple):
    """How far a lane has read a streamed source."""

    epoch: int = 0
    place: int = 0
    """Shards of this epoch that are finished."""
    window: int = 0
    taken: int = 0
    """Rows that the lane took from the window."""


class TableFeed:
    """A source whose rows can be fetched by number: each epoch is a permutation of (seed, source, epoch)."""

    def __init__(self, source: int, table: RowTable, seed: int, shuffle: bool) -> None:
        self._source, self._table, self._seed, self._shuffle = source, table, seed, shuffle
        self.num_rows = len(table)
        self.extent = f"{self.num_rows} rows"
        """What a resumed run must find again."""

    def next(self, ordinal: int, lane: int, cursor: Cursor) -> tuple[Ref, Cursor]:
        """The `ordinal`-th sample of the run from this source; nothing depends on the lane."""
        return self.place(ordinal), cursor

    def place(self, ordinal: int) -> Ref:
        """The `ordinal`-th sample of the run from this source."""
        epoch, row = divmod(ordinal, self.num_rows)
        if self._shuffle:
            row = permute(row, self.num_rows, permutation_keys(self._seed, self._source, epoch))
        return Ref(self._source, 0, row)

    def fetch(self, refs: Sequence[Ref]) -> list[Row | DataError]:
        """The rows, in this order; a bad row is the DataError it raised."""
        return each(self._table.rows, [ref.row for ref in refs])


class ShardFeed:
    """A source that is read forwards. Lane l reads shards l, l + lanes, ..., one after the other.

    With fewer shards than lanes, several lanes share a shard and each takes a fixed part of every window. With 8 lanes
    and 3 shards, shard 0 is read by lanes 0, 3 and 6: windows of 3,072 rows, of which lane 3 takes the permuted
    places 1, 4, 7, ...
    """

    num_rows = None

    def __init__(self, source: int, shards: RowShards, seed: int, shuffle: bool, lanes: int) -> None:
        self._source, self._shards, self._seed, self._shuffle, self._lanes = source, shards, seed, shuffle, lanes
        self.extent = f"{shards.num_shards} shards"
        self._windows: OrderedDict[tuple[int, int], list[Row | DataError]] = OrderedDict()
        # A lane that enters a new window still fetches from the one before, and lanes move on at about the same time:
        # with room for 10 windows, 8 lanes dropped what the next one needed, and read 2.3 rows for each one used.
        self._max_windows = 2 * min(lanes, shards.num_shards) + 2
        self._readers: dict[int, tuple[int, Iterator[Row]]] = {}

    def next(self, ordinal: int, lane: int, cursor: Cursor) -> tuple[Ref, Cursor]:
        """The row at `cursor` of this lane, and the cursor after it. Reads the window that it is in."""
        num_shards = self._shards.num_shards
        own = range(lane % num_shards, num_shards, self._lanes)
        first_epoch = cursor.epoch
        while cursor.epoch < first_epoch + 2:
            place, *key = cursor.place, self._seed, self._source, cursor.epoch
            shard = own[permute(place, len(own), permutation_keys(*key, lane)) if self._shuffle else place]
            rows = self._window(shard, cursor.window)
            at = lane // num_shards + cursor.taken * self._sharers(shard)
            if at < len(rows):
                if self._shuffle:
                    at = permute(at, len(rows), permutation_keys(*key, shard, cursor.window))
                row = cursor.window * self._window_size(shard) + at
                return Ref(self._source, shard, row), cursor._replace(taken=cursor.taken + 1)
            if len(rows) == self._window_size(shard):
                cursor = Cursor(cursor.epoch, place, cursor.window + 1)
            elif place + 1 < len(own):
                cursor = Cursor(cursor.epoch, place + 1)
            else:
                cursor = Cursor(cursor.epoch + 1)
        raise DataError(
            f"lane {lane} of {self._lanes} found no row in a whole epoch of its shards {list(own)}",
            where=f"data.train.{self._source}",
            cure="set data.packing.lanes to the number of shards, or read this source without streaming",
        )

    def fetch(self, refs: Sequence[Ref]) -> list[Row | DataError]:
        """The rows, in this order; a bad row is the DataError it raised."""
        found = {}
        for ref in sorted(set(refs)):
            window, at = divmod(ref.row, self._window_size(ref.shard))
            found[ref] = self._window(ref.shard, window)[at]
        return [found[ref] for ref in refs]

    def _sharers(self, shard: int) -> int:
        return max(1, -(-(self._lanes - shard) // self._shards.num_shards))

    def _window_size(self, shard: int) -> int:
        return WINDOW * self._sharers(shard)

    def _window(self, shard: int, window: int) -> list[Row | DataError]:
        """Rows of one window; fewer than its size, or none, at the shard's end."""
        key = shard, window
        if key not in self._windows:
            self._windows[key] = self._read(shard, window * self._window_size(shard), self._window_size(shard))
            if len(self._windows) > self._max_windows:
                self._windows.popitem(last=False)
        self._windows.move_to_end(key)
        return self._windows[key]

    def _read(self, shard: int, start: int, size: int) -> list[Row | DataError]:
        at, reader = self._readers.pop(shard, (-1, iter(())))
        if at != start:
            reader = self._shards.read(shard, start)
        rows: list[Row | DataError] = []
        while len(rows) < size:
            try:
                for row in islice(reader, size - len(rows)):
                    rows.append(row)
                break
            except DataError as error:
                # One bad row keeps its place and reading goes on behind it; two in a row: the shard fails from here on.
                failing = bool(rows) and isinstance(rows[-1], DataError)
                rows += [error] * (size - len(rows) if failing else 1)
                reader = self._shards.read(shard, start + len(rows))
        self._readers[shard] = (start + len(rows), reader)
        return rows


def each(work: Callable[[Sequence[A]], list[B]], items: Sequence[A]) -> list[B | DataError]:
    """`work(items)`; where that is refused, item by item, so that only the bad ones become their DataError."""
    try:
        return [*work(items)]
    except DataError as error:
        if len(items) == 1:
            return [error]
        return [result for item in items for result in each(work, [item])]
