"""A loss that brings faults about the ranks that compute it, in the middle of a step; its value is that of `nll`."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING

from burnish.losses.nll import NLL
from tests.supervision_helpers import suffer_once

if TYPE_CHECKING:
    from burnish.types import Block, LossOutput, TokenOutputs

CALLS = itertools.count()
"""Micro-batches of this process."""


class Perilous(NLL):
    """The negative log-likelihood."""

    type: str = "tests.perilous_loss:Perilous"  # pyright: ignore[reportIncompatibleVariableOverride]
    marks: str
    """Folder that remembers which faults have been."""
    faults: dict[str, str] = {}
    """By `rank:call`, what happens there once."""

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        suffer_once(Path(self.marks), int(os.environ["RANK"]), next(CALLS), self.faults)
        return super().__call__(outputs, block)
