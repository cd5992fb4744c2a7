"""The first rows of a source, for `burnish check`: bad ones are noted and passed over, where a run would stop; and what
rendering them showed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from burnish.errors import DataError

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from burnish.data.sources.base import RowShards, RowTable
    from burnish.types import Rendered, Row

ROWS_AT_ONCE = 256
"""Rows tokenised together."""


@dataclass(slots=True)
class Seen:
    """What rendering the rows of one source showed."""

    num_rows: int = 0
    num_untrained: int = 0
    lengths: list[int] = field(default_factory=list)
    """Tokens of each group that would be trained on."""
    longest: int = 0
    """Tokens of the longest document."""
    beyond_row: list[int] = field(default_factory=list)
    """Tokens of each group that was cut or dropped because a packed row is shorter."""
    fates: Counter[str] = field(default_factory=Counter)
    refusals: list[DataError] = field(default_factory=list)

    def add(self, rendered: Rendered | DataError) -> None:
        """Counts one row."""
        from burnish.data.length import longest_document

        self.num_rows += 1
        if isinstance(rendered, DataError):
            self.refusals.append(rendered)
            return
        self.fates += rendered.fates
        if rendered.refusal is not None:
            self.refusals.append(rendered.refusal)
            return
        if any("packed row" in fate for fate in rendered.fates):
            self.beyond_row.append(rendered.fates.total() - rendered.fates["truncated"])
        if rendered.group is not None:
            self.lengths.append(len(rendered.group))
            self.longest = max(self.longest, longest_document(rendered.group))
            self.num_untrained += not any(sample.loss_mask.any() for sample in rendered.group.samples)


def is_table(table: RowTable | RowShards) -> TypeIs[RowTable]:
    """Whether its rows are counted and have numbers; a stream of shards has neither."""
    return hasattr(table, "__len__")


def batches(table: RowTable | RowShards, num_rows: int | None, refusals: list[DataError]) -> Iterator[list[Row]]:
    """The first rows of a source, in batches; unusable rows are noted in `refusals` and left out."""
    if not is_table(table):
        shards = (table.read(shard, 0) for shard in range(table.num_shards))
        rows = itertools.islice(itertools.chain.from_iterable(shards), num_rows)
        while batch := list(itertools.islice(_up_to_bad(rows, refusals), ROWS_AT_ONCE)):
            yield batch
        return
    total = len(table) if num_rows is None else min(num_rows, len(table))
    for start in range(0, total, ROWS_AT_ONCE):
        indices = range(start, min(start + ROWS_AT_ONCE, total))
        try:
            yield table.rows(indices)
        except DataError:
            yield _one_by_one(table, indices, refusals)


def _up_to_bad(rows: Iterator[Row], refusals: list[DataError]) -> Iterator[Row]:
    """A stream up to its first bad row: what follows cannot be reached."""
    try:
        yield from rows
    except DataError as error:
        refusals.append(error)


def _one_by_one(table: RowTable, indices: range, refusals: list[DataError]) -> list[Row]:
    """The rows that can be read; which of a batch could not, only reading them alone can tell."""
    rows = []
    for index in indices:
        try:
            rows += table.rows([index])
        except DataError as error:
            refusals.append(error)
    return rows
