"""What a source is: rows by number, or shards to be streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Protocol, runtime_checkable

from annotated_types import Gt

from burnish.component import Component

if TYPE_CHECKING:
    from burnish.types import Row


class RowTable(Protocol):
    """Rows that can be fetched in any order; opening it may index the file, never load it."""

    def __len__(self) -> int: ...

    def rows(self, indices: Sequence[int]) -> list[Row]:
        """The rows of these numbers, in this order. Bad rows raise DataError naming file and line."""
        ...


@runtime_checkable
class RowShards(Protocol):
    """Rows that can only be read forwards, shard by shard; their number may be unknown."""

    num_shards: int

    def read(self, shard: int, start: int) -> Iterator[Row]:
        """Rows of one shard from its row number `start` on."""
        ...


class Source(Component):
    """Where rows come from."""

    weight: Annotated[float, Gt(0)] = 1.0
    """Share of the samples drawn from this source, relative to the other sources' weights; exact to one sample."""

    columns: dict[str, str] = {}
    """The file's names for what Burnish calls otherwise: `{question: prompt, answer: completion}`; or a column renamed
    out of the way: `{text: unused}`."""

    def renamed(self, record: dict[str, Any]) -> dict[str, Any]:
        """`record` under the names that `columns` gives; a renamed column wins over one that had the name already."""
        if not self.columns:
            return record
        kept = {name: value for name, value in record.items() if name not in self.columns}
        return kept | {ours: record[theirs] for theirs, ours in self.columns.items() if theirs in record}

    def open(self) -> RowTable | RowShards:
        """Opens the files. Raises DataError naming the path if one is missing, empty or unreadable."""
        raise AssertionError(f"{type(self).__name__} cannot be opened")
