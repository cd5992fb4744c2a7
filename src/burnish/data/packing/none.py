"""No packing: one group a row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from burnish.data.packing.base import Packing

if TYPE_CHECKING:
    from collections.abc import Sequence


class NoPacking(Packing):
    """Every group gets a row of its own, the rest is padding: for models that must not be packed, and to compare."""

    type: Literal["none"] = "none"

    def open(self, row_length: int, bins: Sequence[tuple[int, int]] = ()) -> OneGroupPacker:
        assert not bins, "a row of one group is never open"
        return OneGroupPacker()


class OneGroupPacker:
    """Opens a bin for each group and closes it at once."""

    def __init__(self) -> None:
        self._next = 0

    def add(self, length: int, documents: int = 1) -> tuple[int, int | None]:
        number = self._next
        self._next += 1
        return number, number
