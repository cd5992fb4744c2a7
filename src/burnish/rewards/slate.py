"""What a recommended list is worth: how much of it is wanted, how varied it is, how far from what everybody sees."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import log, log2
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from burnish.errors import DataError
from burnish.rewards.base import Reward


class Slate(Reward):
    """One term of the value of a list of items, between 0 and 1; list it once for each term, with its weight.

    A slot that is no item, that repeats an earlier one, or that holds what the history holds, adds nothing: neither
    diversity nor novelty can be had by repetition. Prompts and completions are lists of item names, as rows of
    `{type: events}` make them.
    """

    type: Literal["slate"] = "slate"
    of: Literal["relevance", "diversity", "novelty"]
    """`relevance`: normalised discounted cumulative gain of the items that are in the row's `future` (Jarvelin and
    Kekalainen, 2002): 1 / log2(place + 2) for each, divided by what the best order of the best items had. `diversity`:
    mean distance of two slots, one less the share of categories that both have (Ziegler et al., WWW 2005). `novelty`:
    mean of -log p(item) / log N over the slots, p its share of N events (Zhou et al., PNAS 2010)."""
    table: str | None = None
    """For `novelty` the events that popularity is counted in, a .csv, .tsv or .inter file with a column `item` or
    `item_id`; for `diversity` a table of such a column and one of categories. Without it any two items are as far apart
    as can be, and diversity is what is not repeated."""
    categories: str = "categories"
    """For `diversity`: the column of the table with an item's categories, separated by spaces."""

    @model_validator(mode="after")
    def _table_where_it_is_read(self) -> Self:
        if self.of == "novelty" and self.table is None:
            raise ValueError("novelty is counted in a `table` of events")
        if self.of == "relevance" and self.table is not None:
            raise ValueError("relevance reads the row's `future`, and no `table`")
        return self

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """`future`, where that is what is compared with."""
        return ("future",) if self.of == "relevance" else ()

    def open(self) -> LiveSlate:
        """Reads the table.

        Raises:
            DataError: it is not there, or lacks a column.
        """
        if self.of == "relevance":
            return LiveSlate(_Relevance())
        if self.of == "novelty":
            assert self.table is not None
            counts = Counter(item for item, _ in _rows(self.table, None))
            if sum(counts.values()) < 2:
                raise DataError("holds no two events to count popularity in", self.table, "name the table of events")
            return LiveSlate(_Novelty(counts))
        pairs = _rows(self.table, self.categories) if self.table is not None else iter(())
        return LiveSlate(_Diversity({item: frozenset(words.split()) for item, words in pairs}))


class LiveSlate:
    """See `LiveReward`."""

    def __init__(self, term: _Relevance | _Diversity | _Novelty) -> None:
        self._term = term

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[float]:
        """One value for each list."""
        futures = columns.get("future", [[]] * len(prompts))
        return [self._term(*each) for each in zip(prompts, completions, futures, strict=True)]


class _Relevance:
    def __call__(self, history: list[str], slate: list[str], future: list[str]) -> float:
        wanted, gain = set(future), 0.0
        best = sum(1 / log2(place + 2) for place in range(min(len(wanted), len(slate))))
        for place, item in enumerate(slate):
            if item in wanted:
                gain += 1 / log2(place + 2)
                wanted.remove(item)  # a second time it is worth nothing
        return gain / best if best else 0.0


@dataclass(frozen=True, slots=True)
class _Diversity:
    categories: dict[str, frozenset[str]]

    def __call__(self, history: list[str], slate: list[str], future: list[str]) -> float:
        pairs = len(slate) * (len(slate) - 1) / 2
        distances = (self._distance(a, b) for a, b in combinations(_earning(history, slate), 2))
        return sum(distances) / pairs if pairs else 0.0

    def _distance(self, a: str, b: str) -> float:
        ours, theirs = self.categories.get(a, frozenset()), self.categories.get(b, frozenset())
        return 1 - len(ours & theirs) / len(ours | theirs) if ours and theirs else 1.0


class _Novelty:
    def __init__(self, counts: Counter[str]) -> None:
        total = sum(counts.values())
        self._worth = {item: log(total / count) / log(total) for item, count in counts.items()}

    def __call__(self, history: list[str], slate: list[str], future: list[str]) -> float:
        worth = sum(self._worth.get(item, 1.0) for item in _earning(history, slate))
        return worth / len(slate) if slate else 0.0


def _earning(history: list[str], slate: list[str]) -> list[str]:
    """Items of the list that neither it nor the history held before, in order."""
    known = {"", *history}
    return [item for item in dict.fromkeys(slate) if item not in known]


def _rows(path: str, column: str | None) -> Iterator[tuple[str, str]]:
    """(item, what stands in the column) of a table's lines; RecBole's `name:type` is `name`."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError("no such file", path, "correct `table` of the reward")
    delimiter, quoting = (",", csv.QUOTE_MINIMAL) if file.suffix == ".csv" else ("\t", csv.QUOTE_NONE)
    with file.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, quoting=quoting)
        header = [name.partition(":")[0] for name in next(reader, [])]
        item = next((header.index(name) for name in ("item", "item_id") if name in header), None)
        value = None if column is None else (header.index(column) if column in header else None)
        if item is None or (column is not None and value is None):
            missing = "item` or `item_id" if item is None else column
            raise DataError(
                f"no column `{missing}`; there are {', '.join(header) or 'none'}", path, "name another table"
            )
        for row in reader:
            if len(row) == len(header):
                yield row[item], "" if value is None else row[value]
