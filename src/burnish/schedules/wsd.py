"""Warm-up, stable, decay."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from burnish.schedules.base import Schedule


class WSD(Schedule):
    """Stays at 1, then falls in a straight line over the end of the run. Hu et al., arXiv:2404.06395, sec. 4."""

    type: Literal["wsd"] = "wsd"
    decay_ratio: Annotated[float, Interval(gt=0, le=1)] = 0.2
    """Share of the run, at its end, over which the factor falls."""
    min_ratio: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Factor at the end of the run."""

    def decay(self, progress: float) -> float:
        left = min(1.0, (1 - progress) / self.decay_ratio)
        return self.min_ratio + (1 - self.min_ratio) * left
