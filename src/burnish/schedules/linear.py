"""A straight line down."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from burnish.schedules.base import Schedule


class Linear(Schedule):
    """From 1 at the start of the run in a straight line to `min_ratio` at its end."""

    type: Literal["linear"] = "linear"
    min_ratio: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Factor at the end of the run."""

    def decay(self, progress: float) -> float:
        return self.min_ratio + (1 - self.min_ratio) * (1 - progress)
