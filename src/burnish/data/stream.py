"""The packed rows of a run, as a pure function of (data, seed, position): lanes in turn, made ahead, resumed exactly.

Packed row g of the run is the (g div L)-th of lane g mod L. Every row carries its lane's state after it, so the state
of the stream is that of the rows which were *taken*, whatever the background thread has made beyond them.

A run of `num_epochs` ends in a tail: once the lane whose turn it is has no finished row left, what the lanes
still hold is collected in a fixed order, the emptier rows are packed anew together, and the last step is filled up with
empty rows.
"""

from __future__ import annotations

from collections import deque
from itertools import zip_longest
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from burnish.data.feed import ShardFeed, TableFeed
from burnish.data.lane import Entry, Kitchen, Lane, Packed
from burnish.data.ledger import Ledger, Seen, add_states
from burnish.data.packing.base import max_documents
from burnish.data.packing.best_fit import merge_rows
from burnish.data.packing.layout import empty_block, layout, sizes
from burnish.data.prefetch import Prefetch
from burnish.data.sources.base import RowShards
from burnish.errors import DataError, ResumeError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from burnish.data.config import DataConfig
    from burnish.data.lane import Accept
    from burnish.data.renderers.base import LiveRenderer
    from burnish.mesh import Mesh
    from burnish.types import Block


class Made(NamedTuple):
    """A packed row, and what taking it changes."""

    block: Block | None
    """None: another rank's row, or the end."""
    lane: int
    """-1: a row of the tail."""
    state: dict[str, Any] | None
    """The lane's, after this row."""
    seen: list[Seen]
    tokens: int
    last: bool = False
    """No row, but the end: `seen` was dropped behind the last row."""


class Stream:
    """Packed rows of a run, made ahead by a background thread.

    Use: `load` if resuming, then `take` until it returns nothing, `close` in any case.
    """

    def __init__(
        self,
        kitchen: Kitchen,
        data: DataConfig,
        num_samples: int | None,
        rank: int = 0,
        world_size: int = 1,
        together: int = 1,
    ) -> None:
        self._kitchen, self._data, self._num_samples = kitchen, data, num_samples
        self._rank, self._world_size, self._together = rank, world_size, together
        self._row_length = data.packing.tokens_per_row(data.max_length)
        # A finite run packs at its end what all lanes hold together, so there every rank makes all rows.
        self._stride = world_size if num_samples is None else 1
        self._lanes = [lane for lane in range(data.packing.lanes) if num_samples is not None or self._owns(lane)]
        self._names = [f"data.train.{source}" for source in range(len(data.train))]
        self._ledger = Ledger(self._names, self._row_length)
        self._states: dict[int, dict[str, Any]] = {}
        self._blocks = self._tail = self._samples = 0
        self._over = False
        self._columns: dict[str, Tensor] | None = None
        """Of some row, for the shape of what fills up the last step; None: no row was made yet."""
        self._ready: deque[Made] = deque()
        self._prefetch: Prefetch[Made] | None = None
        self.wait_seconds = 0.0
        """Total time that `take` waited for rows."""

    def take(self, num_blocks: int) -> list[Block]:
        """The next rows of this rank; the last take of a finite run is filled up with empty rows, then: [].

        Raises:
            DataError: a row of these cannot be made. Nothing is consumed: `state` is what it was before.
            RunFailed: no row came within `prefetch.DEADLINE_SECONDS`.
        """
        count = num_blocks * (self._world_size // self._stride)
        self._wait(count)
        taken = [self._ready.popleft() for _ in range(min(count, len(self._ready)))]
        for made in taken:
            self._consume(made)
        if not taken or taken[0].last:
            return []
        blocks = [made.block for made in taken if made.block is not None]
        while len(blocks) < num_blocks:
            blocks.append(empty_block(self._row_length, max_documents(self._row_length), self._columns or {}))
            self._ledger.count_block(0)
        return blocks

    @property
    def over(self) -> bool:
        """Whether every row has been taken. Waits for the next one to be made, where that is not known yet."""
        if self._num_samples is not None:
            try:
                self._wait(1)
            except DataError:
                return False  # there is a row, if a bad one: the take that reaches it raises this again
            if self._ready and self._ready[0].last:
                self._consume(self._ready.popleft())
        return self._over

    def state(self) -> dict[str, Any]:
        """JSON: the consumed frontier. The states of several ranks become one by `merge_states`."""
        return {
            "blocks": self._blocks,
            "tail": self._tail,
            "samples": self._samples,
            "over": self._over,
            "extents": [feed.extent for feed in self._kitchen.feeds],
            "lanes": {str(lane): state for lane, state in self._states.items()},
            "ledger": self._ledger.state(),
        }

    def together(self, mesh: Mesh, mine: dict[str, Any]) -> dict[str, Any]:
        """The state of the run from those of all its ranks: any number of ranks can load it."""
        return merge_states(mesh.gather(mine)[:: mesh.peers])

    def load(self, state: dict[str, Any]) -> None:
        """Goes on behind what `state` had consumed; what was made ahead is thrown away.

        Raises:
            ResumeError: a source has another number of rows, or of shards, than it had.
        """
        if self._prefetch is not None:
            self._prefetch.close()
            self._prefetch = None
        self._ready.clear()
        for name, before, feed in zip(self._names, state["extents"], self._kitchen.feeds, strict=True):
            if before != feed.extent:
                raise ResumeError(
                    f"{feed.extent} now, {before} when the run was saved",
                    where=name,
                    cure="bring the data back as they were, or start a new run_dir",
                )
        self._blocks, self._tail, self._samples = state["blocks"], state["tail"], state["samples"]
        self._over = state["over"]
        self._states = {int(lane): kept for lane, kept in state["lanes"].items() if int(lane) in self._lanes}
        self._ledger = Ledger(self._names, self._row_length)
        if self._rank == 0:  # the ranks' ledgers add up to the run's
            self._ledger.load(state["ledger"])

    def progress(self) -> float | None:
        """Share of all samples that was consumed, over all ranks; None where the run has no last sample."""
        return None if self._num_samples is None else self._samples / self._num_samples

    def ledger_state(self) -> dict[str, Any]:
        """Where the tokens that this rank consumed went."""
        return self._ledger.state()

    def ledger(self, states: Sequence[dict[str, Any]] | None = None) -> dict[str, Any]:
        """Where the consumed tokens went, by the `ledger_state` of all ranks, or of this one: see `Ledger.report`."""
        if states is None:
            return self._ledger.report()
        together = Ledger(self._names, self._row_length)
        together.load(add_states(states))
        return together.report()

    def close(self) -> None:
        """Ends the background threads."""
        self._kitchen.close()
        if self._prefetch is not None:
            self._prefetch.close()

    def _owns(self, row: int) -> bool:
        """Rows are dealt to the ranks in turn, `together` at a time."""
        return row // self._together % self._world_size == self._rank

    def _wait(self, count: int) -> None:
        """Brings `count` items to `_ready`, or all that are left."""
        if self._over:
            return
        started = perf_counter()
        if self._prefetch is None:
            items = self._produce(self._blocks - self._tail, self._tail, dict(self._states))
            # At least a whole step's rows: what is not made while a step computes, the next step waits for.
            size = max(count, self._data.prefetch * (self._world_size // self._stride))
            self._prefetch = Prefetch(items, size, lambda: self._kitchen.doing)
        try:
            while len(self._ready) < count and (made := self._prefetch.get()) is not None:
                self._ready.append(made)
        finally:
            self.wait_seconds += perf_counter() - started

    def _consume(self, made: Made) -> None:
        self._samples += len(made.seen)
        if made.block is not None or (made.last and self._rank == 0):
            self._ledger.count(made.seen)
        if made.last:
            self._over = True
            return
        if made.block is not None:
            self._ledger.count_block(made.tokens)
        self._blocks += self._stride
        if made.state is None:
            self._tail += 1
        else:
            self._states[made.lane] = made.state

    def _produce(self, row: int, tail: int, states: dict[int, dict[str, Any]]) -> Iterator[Made]:
        """All items from row `row` of the run on, less the first `tail` ones of its tail."""
        lanes = {
            lane: Lane(lane, self._kitchen, self._data, self._num_samples, states.get(lane)) for lane in self._lanes
        }
        while True:
            if self._stride == 1 or self._owns(row):
                packed = lanes[row % self._data.packing.lanes].next()
                if packed is None:
                    break
                yield self._made(row, packed)
            row += 1
        rows, dropped = _tail(lanes.values(), self._row_length)
        if row == 0 and not rows:
            fates = sorted({fate for entry in dropped for fate in entry.rendered.fates})
            raise DataError(
                f"nothing to train on: all {len(dropped)} samples were dropped ({', '.join(fates)})",
                where=self._names[0],
                cure="see what becomes of a row with `burnish data`; raise data.max_length if they are too long",
            )
        for number, entries in enumerate(rows):
            if number >= tail:
                yield self._made(row + number, Packed(entries, [] if number else dropped, None))
        yield Made(None, -1, None, [] if rows else _seen([], dropped), 0, last=True)

    def _made(self, row: int, packed: Packed) -> Made:
        groups = [entry.group for entry in packed.entries]
        own = self._owns(row)
        block = None
        if own or self._columns is None:  # another rank's first row says which columns there are, too
            block = layout(groups, self._row_length, max_documents(self._row_length))
            self._columns = block.columns
        return Made(
            block if own else None,
            row % self._data.packing.lanes if packed.state else -1,
            packed.state,
            _seen(packed.entries, packed.dropped),
            sum(map(len, groups)),
        )


def _seen(entries: list[Entry], dropped: list[Entry]) -> list[Seen]:
    return [
        Seen(entry.ref.source, entry.rendered.fates, is_dropped)
        for part, is_dropped in ((entries, False), (dropped, True))
        for entry in part
    ]


def _tail(lanes: Iterable[Lane], row_length: int) -> tuple[list[list[Entry]], list[Entry]]:
    """(the last rows of a finite run, samples dropped on the way): finished rows first, then the merged open ones."""
    finished, dropped = [], []
    for lane in lanes:
        rows = []
        while (packed := lane.next()) is not None:
            rows.append(packed.entries)
            dropped += packed.dropped
        finished.append(rows)
        dropped += lane.take_dropped()
    open_rows = _in_turn([list(lane.bins.values()) for lane in lanes])
    merged = merge_rows([sizes(entry.group for entry in row) for row in open_rows], row_length)
    entries = [entry for row in open_rows for entry in row]
    return _in_turn(finished) + [[entries[index] for index in row] for row in merged], dropped


def _in_turn(columns: Sequence[Sequence[list[Entry]]]) -> list[list[Entry]]:
    return [row for rows in zip_longest(*columns) for row in rows if row is not None]


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state of a run from those of all its ranks, rank 0's first: any number of ranks can load it."""
    lanes = {lane: kept for state in states for lane, kept in state["lanes"].items()}
    return {**states[0], "lanes": lanes, "ledger": add_states([state["ledger"] for state in states])}


def open_stream(
    data: DataConfig,
    renderer: LiveRenderer,
    *,
    seed: int,
    num_epochs: int | None,
    rank: int = 0,
    world_size: int = 1,
    together: int = 1,
    accept: Accept | None = None,
) -> Stream:
    """Opens the training sources. Nothing is rendered before the first `take`.

    Args:
        rank, world_size: of the ranks that share the rows.
        together: rows that go to one rank, next to each other in the run.
        accept: raises DataError for a group that the run cannot use: its row is refused when it is reached.
        num_epochs: the run ends after this many times the rows of all sources together, drawn by the sources' weights:
            with weights 1 and 1, sources of 900 and 100 rows give 500 samples each an epoch. None: it never ends.

    Raises:
        DataError: a file is missing or empty, `num_epochs` with a streamed source, ranks that do not divide the lanes.
    """
    if world_size > 1 and data.packing.lanes % (world_size * together):
        each = f" of {together} rows at a time" if together > 1 else ""
        raise DataError(
            f"{world_size} ranks{each} do not divide {data.packing.lanes} lanes",
            where="data.packing.lanes",
            cure=f"set it to a multiple of {world_size * together}",
        )
    feeds = []
    for number, source in enumerate(data.train):
        opened = source.open()
        if not isinstance(opened, RowShards):
            feeds.append(TableFeed(number, opened, seed, data.shuffle))
            continue
        if num_epochs is not None:
            raise DataError(
                "the number of rows of a streamed source is not known",
                where=f"data.train.{number}",
                cure="give num_steps instead of num_epochs, or read the source without streaming",
            )
        feeds.append(ShardFeed(number, opened, seed, data.shuffle, data.packing.lanes))
    num_samples = None if num_epochs is None else num_epochs * sum(feed.num_rows for feed in feeds)
    return Stream(Kitchen(feeds, data, renderer, accept), data, num_samples, rank, world_size, together)
