"""Answers marked good or bad teach by their difference: data of one kind alone are refused before anything is spent.

Reads rows only until it has met both kinds, and renders none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from burnish.data.formats import parts
from burnish.data.sources.base import RowShards
from burnish.errors import DataError

if TYPE_CHECKING:
    from burnish.data.config import DataConfig
    from burnish.types import RowFormat


def refuse_one_sided(data: DataConfig, row_format: RowFormat) -> None:
    """Raises DataError where every row of `data.train` is desirable, or every one undesirable.

    Rows that are refused themselves are passed over; a streamed source may hold anything, and is not read.
    """
    if row_format.kind != "unpaired":
        return
    met: set[float] = set()
    num_rows = 0
    for source in data.train:
        table = source.open()
        if isinstance(table, RowShards):
            return
        num_rows += len(table)
        for index in range(len(table)):
            try:
                met |= {part.columns["preference"] for row in table.rows([index]) for part in parts(row, row_format)}
            except DataError:
                continue
            if len(met) == 2:
                return
    if met:
        kind = "desirable" if 1.0 in met else "undesirable"
        raise DataError(f"all {num_rows:,} rows are {kind}", "data.train", "add rows of the other label")
