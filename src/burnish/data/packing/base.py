"""What a packing is: which open row a group goes into."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Protocol

from annotated_types import Ge

from burnish.component import Component
from burnish.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence


class Packer(Protocol):
    """Rows being filled, by length alone: it never sees a token, so one packer serves every kind of group.

    State is the fill of the open bins, which the caller keeps beside the bins' contents and hands to `Packing.open`.
    """

    def add(self, length: int, documents: int = 1) -> tuple[int, int | None]:
        """(bin the next group goes into, bin that this closed or None). Ids count up and are never used twice."""
        ...


class Packing(Component):
    """How groups are laid into fixed-length rows."""

    row_length: Annotated[int, Ge(2)] | Literal["max_length"] = "max_length"
    """Tokens in a packed row; `max_length`: as many as the longest document may have."""
    lanes: Annotated[int, Ge(1)] = 8
    """Virtual shards that pack on their own, so rows do not depend on the number of ranks, which must divide it."""

    def tokens_per_row(self, max_length: int) -> int:
        """`row_length` as a number. Raises DataError if the longest document would not fit into a row."""
        if self.row_length == "max_length":
            return max_length
        if self.row_length < max_length:
            raise DataError(
                f"rows of {self.row_length} tokens cannot hold a document of max_length {max_length}",
                where="data.packing.row_length",
                cure="raise row_length or lower max_length",
            )
        return self.row_length

    def open(self, row_length: int, bins: Sequence[tuple[int, int]] = ()) -> Packer:
        """A packer whose open bins are `bins`: (tokens, documents) in them, with ids 0, 1, 2... in this order."""
        raise AssertionError(f"{type(self).__name__} cannot be opened")


def max_documents(row_length: int) -> int:
    """Documents a row may hold: fixed by its length, so that every block has the same shape and compile sees one graph.

    2,048 tokens: 256. Only documents of under 8 tokens on average leave a row unfilled because of it.
    """
    return max(8, row_length // 8)
