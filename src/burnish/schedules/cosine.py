"""Half a cosine down."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from annotated_types import Interval

from burnish.schedules.base import Schedule


class Cosine(Schedule):
    """Half a cosine from 1 to `min_ratio`. Loshchilov and Hutter, arXiv:1608.03983, eq. 5, without restarts."""

    type: Literal["cosine"] = "cosine"
    min_ratio: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Factor at the end of the run."""

    def decay(self, progress: float) -> float:
        return self.min_ratio + (1 - self.min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
