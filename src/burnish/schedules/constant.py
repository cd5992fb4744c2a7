"""A learning rate that stays."""

from __future__ import annotations

from typing import Literal

from burnish.schedules.base import Schedule


class Constant(Schedule):
    """The learning rate as it is, after the warm-up."""

    type: Literal["constant"] = "constant"

    def decay(self, progress: float) -> float:
        return 1.0
