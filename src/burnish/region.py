"""Where a piece of a tensor lies in the whole: what sharded loading, checkpoints and exports speak of."""

from __future__ import annotations

import math
from typing import NamedTuple


class Region(NamedTuple):
    """A box in a tensor.

    Rows 4 and 5 of a [8, 3] matrix, which rank 2 of 4 holds:

        Region(whole=(8, 3), offsets=(4, 0), lengths=(2, 3))
    """

    whole: tuple[int, ...]
    """Shape of the whole tensor."""
    offsets: tuple[int, ...]
    """Where the box begins, for each dim."""
    lengths: tuple[int, ...]
    """Shape of the box; with a 0 in it the box is empty."""

    @classmethod
    def all_of(cls, shape: tuple[int, ...]) -> Region:
        """The whole tensor as one box."""
        return cls(tuple(shape), (0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        return math.prod(self.lengths)

    @property
    def is_all(self) -> bool:
        return self.lengths == self.whole

    def slices(self) -> tuple[slice, ...]:
        """Indexes this box in the whole tensor."""
        return tuple(slice(begin, begin + length) for begin, length in zip(self.offsets, self.lengths, strict=True))

    def overlap(self, other: Region) -> Region | None:
        """The box that both have; None where they share nothing. Both are of the same whole."""
        assert self.whole == other.whole, f"regions of {self.whole} and {other.whole}"
        spans = zip(self.offsets, self.lengths, other.offsets, other.lengths, strict=True)
        bounds = [(max(a, b), min(a + n, b + m)) for a, n, b, m in spans]
        if any(end <= begin for begin, end in bounds):
            return None
        return Region(self.whole, tuple(b for b, _ in bounds), tuple(e - b for b, e in bounds))

    def within(self, outer: Region) -> tuple[slice, ...]:
        """Indexes this box in a tensor that holds `outer`, of which it is a part."""
        starts = (mine - its for mine, its in zip(self.offsets, outer.offsets, strict=True))
        return tuple(slice(start, start + length) for start, length in zip(starts, self.lengths, strict=True))
