"""The prompts of a run: a pure function of (seed, sources, index), in the order in which rows would train.

A prompt is known by its index alone, so that one that was in flight when a run ended, or whose engine died, is asked
again as it was. Rows come in the mixed order of `mix.py` and `feed.py`; must not know engines and rewards.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from burnish.data.feed import Ref, TableFeed, each
from burnish.data.mix import CHUNK, Mixer
from burnish.data.sources.base import RowShards
from burnish.errors import DataError, ResumeError
from burnish.rollouts import Dropped, Prompt

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from burnish.data.config import DataConfig
    from burnish.data.sources.base import Source
    from burnish.rollouts import Dialogue
    from burnish.types import Row

AHEAD = 32
"""Prompts that are fetched, rendered and tokenised together: 32 cost little more than one."""
_KEPT = 8
"""Batches of `AHEAD` that are held; what is asked again lies mostly in the last."""
MAX_DROPS = 10_000
"""Prompts that may be dropped in a row before the run is given up: it would draw for ever."""


class Prompts:
    """The prompts of a run by their index. Used by one thread at a time."""

    def __init__(
        self,
        data: DataConfig,
        feeds: Sequence[TableFeed],
        dialogue: Dialogue,
        num_prompts: int | None,
        max_prompt_length: int,
    ) -> None:
        self._data, self._feeds, self._dialogue, self._longest = data, feeds, dialogue, max_prompt_length
        self.num_prompts = num_prompts
        """None: there is no end."""
        self.extent = [feed.extent for feed in feeds]
        """JSON: what a resumed run must find again."""
        self._weights = [source.weight for source in data.train]
        self._counts = [(0,) * len(feeds)]
        """Prompts of each source before each chunk of the mixed order, as far as it was walked."""
        self._made: OrderedDict[int, list[Prompt | Dropped | DataError]] = OrderedDict()
        self._barren = 0

    def get(self, index: int) -> Prompt | Dropped | None:
        """The prompt at a place in the run's order; None: behind the end of the last epoch.

        Raises:
            DataError: its row is bad, cannot be asked or is too long; nothing but dropped prompts.
        """
        if self.num_prompts is not None and index >= self.num_prompts:
            return None
        number, at = divmod(index, AHEAD)
        if number not in self._made:
            self._made[number] = self._make(number * AHEAD)
            if len(self._made) > _KEPT:
                self._made.popitem(last=False)
        self._made.move_to_end(number)
        found = self._made[number][at]
        if isinstance(found, DataError):
            raise found
        return found

    def require(self, extent: Sequence[str]) -> None:
        """Raises ResumeError where the sources are no longer what `extent` says they were."""
        for number, (before, now) in enumerate(zip(extent, self.extent, strict=True)):
            if before != now:
                raise ResumeError(
                    f"{now} now, {before} when the run was saved",
                    where=f"data.train.{number}",
                    cure="bring the data back as they were, or start a new run_dir",
                )

    def evaluation(self) -> Iterator[Prompt]:
        """The prompts of `data.eval`, source by source, in file order, numbered from 0; those that are dropped are
        passed over.

        Raises:
            DataError: at the first row that is refused.
        """
        index = 0
        for source in self._data.eval:
            for rows in _batches(source):
                for found in self._asked(rows, index):
                    if isinstance(found, DataError):
                        raise found
                    if isinstance(found, Prompt):
                        yield found
                index += len(rows)

    def _make(self, first: int) -> list[Prompt | Dropped | DataError]:
        stop = first + AHEAD if self.num_prompts is None else min(first + AHEAD, self.num_prompts)
        refs = [self._ref(index) for index in range(first, stop)]
        fetched: dict[Ref, Row | DataError] = {}
        for source in sorted({ref.source for ref in refs}):
            own = list(dict.fromkeys(ref for ref in refs if ref.source == source))
            fetched.update(zip(own, self._feeds[source].fetch(own), strict=True))
        found = self._asked([fetched[ref] for ref in refs], first)
        self._barren = self._barren + len(found) if all(isinstance(one, Dropped) for one in found) else 0
        if self._barren >= min(MAX_DROPS, sum(feed.num_rows for feed in self._feeds)):
            reasons = sorted({one.reason for one in found if isinstance(one, Dropped)})
            raise DataError(
                f"nothing to ask: {self._barren} prompts in a row were dropped ({', '.join(reasons)})",
                where="data.train",
                cure="see what becomes of a row with `burnish data`; give prompts more room if they are too long",
            )
        return found

    def _asked(self, rows: Sequence[Row | DataError], first: int) -> list[Prompt | Dropped | DataError]:
        """One result a row; a row that was not read stays what it is."""
        whole = [row for row in rows if not isinstance(row, DataError)]
        asked = iter(self._dialogue.prompts(whole, first))
        found: list[Prompt | Dropped | DataError] = []
        for index, row in enumerate(rows, first):
            one = row if isinstance(row, DataError) else next(asked)
            if not isinstance(one, DataError):
                one = replace(one, index=index)  # it is another where a row before it could not be read
            found.append(fitted(one, self._longest, self._data.over_length) if isinstance(one, Prompt) else one)
        return found

    def _ref(self, index: int) -> Ref:
        chunk = index // CHUNK
        while len(self._counts) <= chunk:
            walked = len(self._counts)
            mixer = Mixer(self._weights, (walked - 1) * CHUNK, self._counts[-1])
            mixer.at(walked * CHUNK)
            self._counts.append(mixer.counts)
        source, ordinal = Mixer(self._weights, chunk * CHUNK, self._counts[chunk]).at(index)
        return self._feeds[source].place(ordinal)


def fitted(prompt: Prompt, longest: int, over_length: str) -> Prompt | Dropped | DataError:
    """The prompt, or what becomes of one of more than `longest` tokens under `data.over_length`."""
    length = len(prompt.token_ids)
    if length <= longest:
        return prompt
    if over_length == "drop":
        return Dropped(prompt.index, prompt.where, f"prompt longer than {longest} tokens")
    return DataError(
        f"the prompt has {length} tokens, and {longest} leave room for an answer",
        where=prompt.where,
        cure="raise `data.max_length`, or leave such prompts out with `data.over_length: drop`",
    )


def open_prompts(
    data: DataConfig, dialogue: Dialogue, *, seed: int, num_epochs: int | None, max_prompt_length: int
) -> Prompts:
    """Opens the training sources as prompts. Nothing is read before the first `get`.

    Args:
        num_epochs: as in `open_stream`; None: there is no end.
        max_prompt_length: in tokens. A longer one is refused when it is reached, or dropped under `over_length: drop`.

    Raises:
        DataError: a file is missing or empty, a source is streamed, or prompts should be truncated.
    """
    if data.over_length == "truncate":
        raise DataError(
            "a prompt that is cut asks something else",
            where="data.over_length",
            cure="`drop` leaves long prompts out, `refuse` stops at the first",
        )
    feeds = []
    for number, source in enumerate(data.train):
        opened = source.open()
        if isinstance(opened, RowShards):
            raise DataError(
                "prompts of a streamed source have no numbers by which they could be asked again",
                where=f"data.train.{number}",
                cure="read it without streaming",
            )
        feeds.append(TableFeed(number, opened, seed, data.shuffle))
    num_prompts = None if num_epochs is None else num_epochs * sum(feed.num_rows for feed in feeds)
    return Prompts(data, feeds, dialogue, num_prompts, max_prompt_length)


def _batches(source: Source) -> Iterator[Sequence[Row | DataError]]:
    opened = source.open()
    if isinstance(opened, RowShards):
        for shard in range(opened.num_shards):
            reader = opened.read(shard, 0)
            while rows := list(islice(reader, AHEAD)):
                yield rows
        return
    for start in range(0, len(opened), AHEAD):
        yield each(opened.rows, range(start, min(start + AHEAD, len(opened))))
