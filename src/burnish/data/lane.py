"""One lane: its part of the mixed order, rendered, cut to length and packed into its own open bins.

A lane is a pure function of the recipe's data, the seed and its state; it never learns how many ranks there are.
"""

from __future__ import annotations

import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from burnish.data.feed import Cursor, Ref, ShardFeed, TableFeed, each
from burnish.data.length import fit_length
from burnish.data.mix import Mixer
from burnish.errors import DataError, ResumeError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from burnish.data.config import DataConfig
    from burnish.data.renderers.base import LiveRenderer
    from burnish.types import Group, Rendered, Row

    Accept = Callable[[Group], None]

FIRST_ROWS, MAX_ROWS = 16, 128
"""Rows of a lane rendered at once: few at first, so that the first step comes soon, then twice as many each time."""

MAX_DROPS = 10_000
"""Rows a lane may drop on the way to one packed row, so that a lane that keeps next to none cannot hang."""


class Kitchen:
    """Refs to rendered samples: what all lanes share.

    Rows are fetched by the thread that asks. They are rendered by one thread more: tokenizers compute without the
    interpreter's lock, so that packing one batch costs no time beside rendering the next.
    """

    def __init__(
        self,
        feeds: Sequence[TableFeed | ShardFeed],
        data: DataConfig,
        renderer: LiveRenderer,
        accept: Accept | None = None,
    ) -> None:
        """`accept`: see `render_rows`."""
        self.feeds, self._data, self._renderer, self._accept = feeds, data, renderer, accept
        self.weights = [source.weight for source in data.train]
        self.doing = "starting"
        self._pool = ThreadPoolExecutor(1, "burnish-render")

    def close(self) -> None:
        """Waits for what is being rendered, and begins nothing more."""
        self._pool.shutdown(cancel_futures=True)

    def render(self, refs: Sequence[Ref]) -> Callable[[], list[Rendered | DataError]]:
        """Begins to render, all refs together. The call that it returns waits for one result a ref, in order."""
        fetched: dict[Ref, Row | DataError] = {}
        for source in sorted({ref.source for ref in refs}):
            self.doing = f"reading data.train.{source}"
            own = [ref for ref in refs if ref.source == source]
            fetched.update(zip(own, self.feeds[source].fetch(own), strict=True))
        rows = [row for ref in refs if not isinstance(row := fetched[ref], DataError)]
        if rows:
            self.doing = f"rendering {len(rows)} rows from {rows[0].where} on"
        rendering = self._pool.submit(render_rows, rows, self._renderer, self._data, self._accept)

        def results() -> list[Rendered | DataError]:
            rendered = iter(rendering.result())
            return [row if isinstance(row := fetched[ref], DataError) else next(rendered) for ref in refs]

        return results


def render_rows(
    rows: Sequence[Row], renderer: LiveRenderer, data: DataConfig, accept: Accept | None = None
) -> list[Rendered | DataError]:
    """Rendered and cut to `max_length`; a row that the renderer raises for is that DataError.

    Args:
        accept: raises DataError for a group that the run cannot use, which becomes the row's refusal.
    """
    row_length = data.packing.tokens_per_row(data.max_length)

    def fitted(rendered: Rendered) -> Rendered:
        rendered = fit_length(rendered, data.max_length, data.over_length, row_length)
        try:
            if accept is not None and rendered.group is not None:
                accept(rendered.group)
        except DataError as error:
            return replace(rendered, group=None, refusal=error)
        return rendered

    results = each(renderer.render, rows) if rows else []
    return [result if isinstance(result, DataError) else fitted(result) for result in results]


class Entry(NamedTuple):
    """A sample on its way into a row."""

    ref: Ref
    rendered: Rendered

    @property
    def group(self) -> Group:
        assert self.rendered.group is not None
        return self.rendered.group

    @property
    def checksum(self) -> int:
        """Of tokens, mask and columns: a row edited between checkpoint and resume is noticed while in an open bin."""
        checksum = 0
        for sample in self.group.samples:
            for array in (sample.token_ids, sample.loss_mask, *sample.columns.values()):
                checksum = zlib.crc32(np.ascontiguousarray(array).data, checksum)
        return checksum


class Packed(NamedTuple):
    """The contents of a finished row."""

    entries: list[Entry]
    dropped: list[Entry]
    """Samples that were dropped since the lane's row before this."""
    state: dict[str, Any] | None
    """JSON: the lane after this row; None for a row of the tail, which belongs to no lane."""


class _Ticket(NamedTuple):
    sample: int
    counts: tuple[int, ...]
    ref: Ref
    cursor: Cursor


class Lane:
    """Samples `number`, `number` + lanes, ... of the mixed order, up to `num_samples` or for ever."""

    def __init__(
        self,
        number: int,
        kitchen: Kitchen,
        data: DataConfig,
        num_samples: int | None,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._number, self._kitchen, self._num_samples = number, kitchen, num_samples
        self._lanes = data.packing.lanes
        state = state or {"index": number - self._lanes, "counts": None, "cursors": {}, "bins": []}
        self._drawn: int = state["index"]
        self._mixer = Mixer(kitchen.weights, max(0, self._drawn), state["counts"])
        self._cursors = {int(source): Cursor(*cursor) for source, cursor in state["cursors"].items()}
        self._packed_cursors = dict(self._cursors)
        self._ready: deque[tuple[_Ticket, Rendered | DataError]] = deque()
        self._coming: tuple[list[_Ticket], Callable[[], list[Rendered | DataError]]] | None = None
        self._num_rows = FIRST_ROWS
        self._dropped: list[Entry] = []
        self.bins: dict[int, list[Entry]] = dict(enumerate(self._restored(state["bins"])))
        """Contents of the open rows, oldest first."""
        fills = [
            (sum(len(entry.group) for entry in entries), sum(len(entry.group.samples) for entry in entries))
            for entries in self.bins.values()
        ]
        self._packer = data.packing.open(data.packing.tokens_per_row(data.max_length), fills)

    def next(self) -> Packed | None:
        """The next finished row; None when the lane's samples are over (the rest is in `bins`).

        Raises:
            DataError: a row without which the next packed row cannot be made is refused.
        """
        while self._ready or self._refill():
            ticket, rendered = self._ready[0]
            refusal = rendered if isinstance(rendered, DataError) else rendered.refusal
            if refusal is not None:
                raise refusal
            assert not isinstance(rendered, DataError)
            self._ready.popleft()
            self._packed_cursors[ticket.ref.source] = ticket.cursor
            entry = Entry(ticket.ref, rendered)
            if rendered.group is None:
                self._drop(entry)
                continue
            number, closed = self._packer.add(len(entry.group), len(entry.group.samples))
            self.bins.setdefault(number, []).append(entry)
            if closed is not None:
                return Packed(self.bins.pop(closed), self.take_dropped(), self._state(ticket))
        return None

    def take_dropped(self) -> list[Entry]:
        """Samples dropped since the last finished row, once."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def _drop(self, entry: Entry) -> None:
        self._dropped.append(entry)
        if len(self._dropped) >= MAX_DROPS:
            (fate,) = list(entry.rendered.fates)[:1] or ["dropped"]
            raise DataError(
                f"{MAX_DROPS} rows were dropped before one packed row was full, the last as '{fate}'",
                where=entry.rendered.row.where,
                cure="see what becomes of a row with `burnish data`; raise data.max_length if they are too long",
            )

    def _refill(self) -> bool:
        """Brings the next rendered samples to `_ready`, and has those after them rendered meanwhile."""
        (tickets, results), self._coming = self._coming or self._begin(), self._begin()
        self._ready.extend(zip(tickets, results(), strict=True))
        return bool(tickets)

    def _begin(self) -> tuple[list[_Ticket], Callable[[], list[Rendered | DataError]]]:
        tickets = []
        while len(tickets) < self._num_rows:
            index = self._drawn + self._lanes
            if self._num_samples is not None and index >= self._num_samples:
                break
            source, ordinal = self._mixer.at(index)
            cursor = self._cursors.get(source, Cursor())
            ref, self._cursors[source] = self._kitchen.feeds[source].next(ordinal, self._number, cursor)
            tickets.append(_Ticket(index, self._mixer.counts, ref, self._cursors[source]))
            self._drawn = index
        self._num_rows = min(2 * self._num_rows, MAX_ROWS)
        return tickets, self._kitchen.render([ticket.ref for ticket in tickets])

    def _state(self, last: _Ticket) -> dict[str, Any]:
        moved = {str(source): list(cursor) for source, cursor in self._packed_cursors.items() if cursor != Cursor()}
        bins = [[[*entry.ref, entry.checksum] for entry in entries] for entries in self.bins.values()]
        return {"index": last.sample, "counts": list(last.counts), "cursors": moved, "bins": bins}

    def _restored(self, bins: list[list[list[int]]]) -> list[list[Entry]]:
        refs = [Ref(*ref) for refs in bins for *ref, _ in refs]
        checksums = [checksum for refs in bins for *_, checksum in refs]
        entries = []
        for ref, checksum, rendered in zip(refs, checksums, self._kitchen.render(refs)(), strict=True):
            entry = None
            if not isinstance(rendered, DataError) and rendered.group is not None:
                entry = Entry(ref, rendered)
            if entry is None or entry.checksum != checksum:
                raise ResumeError(
                    f"row {ref.row} (shard {ref.shard}) was used before the checkpoint and is "
                    f"{'refused' if entry is None else 'another'} now",
                    where=f"data.train.{ref.source}",
                    cure="bring the data back as they were, or start a new run_dir",
                )
            entries.append(entry)
        remaining = iter(entries)
        return [[next(remaining) for _ in refs] for refs in bins]
