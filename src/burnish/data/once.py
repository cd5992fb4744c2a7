"""Rows of sources once through, in file order, packed: for evaluations, and for a second model that is asked before the
run. Made as they are asked for, without lanes, shuffling or a state."""

from __future__ import annotations

from itertools import chain, islice
from typing import TYPE_CHECKING

from burnish.data.lane import MAX_ROWS, render_rows
from burnish.data.ledger import Ledger, Seen
from burnish.data.packing.base import max_documents
from burnish.data.packing.best_fit import merge_rows
from burnish.data.packing.layout import layout, sizes
from burnish.data.sources.base import RowShards
from burnish.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from burnish.data.config import DataConfig
    from burnish.data.lane import Accept
    from burnish.data.renderers.base import LiveRenderer
    from burnish.data.sources.base import Source
    from burnish.types import Block, Group, Row


def eval_blocks(
    data: DataConfig, renderer: LiveRenderer, ledger: Ledger | None = None, accept: Accept | None = None
) -> Iterator[Block]:
    """The eval sources once through, one after the other, in file order, packed; made as they are asked for.

    Args:
        ledger: counts the rows and their tokens; its sources are those of `data.eval`.
        accept: see `open_stream`.

    Raises:
        DataError: at the first row that is refused.
    """
    row_length = data.packing.tokens_per_row(data.max_length)
    ledger = ledger or Ledger([f"data.eval.{source}" for source in range(len(data.eval))], row_length)
    return _once_through(data.eval, data, renderer, ledger, accept)


def all_blocks(data: DataConfig, renderer: LiveRenderer) -> Iterator[Block]:
    """Every row of the training sources once, then of the eval sources, in file order, packed; made as they are asked
    for. The documents are those of the run; its order and packing are not.

    Raises:
        DataError: at the first row that is refused, or a streamed source, which may have no end.
    """
    for number, source in enumerate(data.train):
        if isinstance(source.open(), RowShards):
            raise DataError(
                "a streamed source cannot be gone through once before the run",
                where=f"data.train.{number}",
                cure="read it without streaming, or ask the second model during the run",
            )
    sources = [*data.train, *data.eval]
    ledger = Ledger([str(number) for number in range(len(sources))], data.packing.tokens_per_row(data.max_length))
    return _once_through(sources, data, renderer, ledger)


def _once_through(
    sources: Sequence[Source],
    data: DataConfig,
    renderer: LiveRenderer,
    ledger: Ledger,
    accept: Accept | None = None,
) -> Iterator[Block]:
    row_length = data.packing.tokens_per_row(data.max_length)
    packer = data.packing.open(row_length)
    bins: dict[int, list[Group]] = {}

    def packed(row: list[Group]) -> Block:
        ledger.count_block(sum(map(len, row)))
        return layout(row, row_length, max_documents(row_length))

    for number, source in enumerate(sources):
        for rendered in chain.from_iterable(render_rows(rows, renderer, data, accept) for rows in _batches(source)):
            refusal = rendered if isinstance(rendered, DataError) else rendered.refusal
            if refusal is not None:
                raise refusal
            assert not isinstance(rendered, DataError)
            ledger.count([Seen(number, rendered.fates, rendered.group is None)])
            if rendered.group is None:
                continue
            at, closed = packer.add(len(rendered.group), len(rendered.group.samples))
            bins.setdefault(at, []).append(rendered.group)
            if closed is not None:
                yield packed(bins.pop(closed))
    groups = [group for row in bins.values() for group in row]
    for row in merge_rows([sizes(row) for row in bins.values()], row_length):
        yield packed([groups[index] for index in row])


def _batches(source: Source) -> Iterator[list[Row]]:
    opened = source.open()
    if isinstance(opened, RowShards):
        for shard in range(opened.num_shards):
            reader = opened.read(shard, 0)
            while rows := list(islice(reader, MAX_ROWS)):
                yield rows
        return
    for start in range(0, len(opened), MAX_ROWS):
        yield opened.rows(range(start, min(start + MAX_ROWS, len(opened))))
