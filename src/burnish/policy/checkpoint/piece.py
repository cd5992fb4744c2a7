"""What one rank gives to a checkpoint: the tensors that it holds, and where each lies in its whole."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from burnish.region import Region


class Piece(NamedTuple):
    """A tensor of one rank, on any device, as a box of the whole tensor.

    Rows 4 and 5 of a [8, 3] matrix, of which this is rank 2 of 4:

        Piece(rows, Region(whole=(8, 3), offsets=(4, 0), lengths=(2, 3)))
    """

    tensor: Tensor
    region: Region
    """Its lengths are the tensor's shape."""
    mine: bool = True
    """This rank writes it. Of the ranks that hold the same box exactly one does."""

    @classmethod
    def all_of(cls, tensor: Tensor) -> Piece:
        """A whole tensor, which this rank writes."""
        return cls(tensor, Region.all_of(tuple(tensor.shape)))
