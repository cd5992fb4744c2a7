"""Streaming best fit: a group goes into the open row that it fills most tightly."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge

from burnish.data.packing.base import Packing, max_documents

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


KEEP_FILL = 31 / 32
"""Rows at least this full stay as they are when open rows are merged at the end."""


class BestFit(Packing):
    """A few rows are filled at once; when none has room for the next group, the fullest is finished."""

    type: Literal["best_fit"] = "best_fit"
    open_bins: Annotated[int, Ge(1)] = 16
    """Rows being filled at once in each lane. More waste less, and hold documents back longer."""

    def open(self, row_length: int, bins: Sequence[tuple[int, int]] = ()) -> BestFitPacker:
        return BestFitPacker(row_length, self.open_bins, bins)


class BestFitPacker:
    """Best fit over at most `open_bins` bins kept sorted by room: O(log open_bins) a group.

    Rows of 10 tokens, two open bins:

        add(6) -> (0, None)    rooms: bin 0: 4
        add(7) -> (1, None)    rooms: bin 1: 3, bin 0: 4
        add(3) -> (1, 1)       tightest room is 3: bin 1 is exactly full and closes
        add(5) -> (2, None)    rooms: bin 0: 4, bin 2: 5
        add(8) -> (3, 3)       none has room and two are open: the fullest of the three closes, here the new one
    """

    def __init__(self, row_length: int, open_bins: int, bins: Sequence[tuple[int, int]] = ()) -> None:
        self._row_length = row_length
        self._open_bins = open_bins
        self._max_documents = max_documents(row_length)
        # (room, id, documents): the first is the fullest, and of two equally full ones the older
        self._open = sorted((row_length - tokens, number, documents) for number, (tokens, documents) in enumerate(bins))
        self._next = len(bins)

    def add(self, length: int, documents: int = 1) -> tuple[int, int | None]:
        assert 0 < length <= self._row_length and documents <= self._max_documents, (length, documents)
        rows = self._open
        at = bisect_left(rows, (length,))
        while at < len(rows) and rows[at][2] + documents > self._max_documents:
            at += 1
        if at < len(rows):
            room, number, held = rows.pop(at)
        else:
            room, number, held = self._row_length, self._next, 0
            self._next += 1
        if held + documents == self._max_documents:
            return number, number
        insort(rows, (room - length, number, held + documents))
        # At most one closes: if the new bin is exactly full, closing it leaves open_bins open.
        if len(rows) > self._open_bins or rows[0][0] == 0:
            return number, rows.pop(0)[1]
        return number, None


def best_fit_decreasing(sizes: Iterable[tuple[int, int]], row_length: int) -> list[list[int]]:
    """Packs groups that are all known: longest first, each into the tightest row.

    Args:
        sizes: (tokens, documents) of each group.

    Returns:
        Rows of indices into `sizes`, each ascending.
    """
    listed = list(sizes)
    packer = BestFitPacker(row_length, open_bins=len(listed) + 1)
    rows: dict[int, list[int]] = {}
    for index in sorted(range(len(listed)), key=lambda i: (-listed[i][0], i)):
        rows.setdefault(packer.add(*listed[index])[0], []).append(index)
    return [sorted(row) for row in rows.values()]


def merge_rows(rows: Sequence[Sequence[tuple[int, int]]], row_length: int) -> list[list[int]]:
    """Open rows made into the last ones of a run: full enough ones as they are, the groups of the others packed anew.

    Full rows stay because the order of samples is the run's; packing everything anew would sort it by length.

    Args:
        rows: (tokens, documents) of the groups in each.

    Returns:
        Rows of indices into the groups of all `rows`, counted through.
    """
    kept, loose, sizes = [], [], []
    for row in rows:
        indices = range(len(sizes), len(sizes) + len(row))
        sizes += row
        if sum(tokens for tokens, _ in row) >= KEEP_FILL * row_length:
            kept.append(list(indices))
        else:
            loose += indices
    packed = best_fit_decreasing([sizes[index] for index in loose], row_length)
    return kept + [[loose[index] for index in row] for row in packed]
