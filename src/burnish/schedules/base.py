"""What a schedule is: a factor on the learning rate, a pure function of progress."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge

from burnish.component import Component


class Schedule(Component):
    """Factor in [0, 1] on every learning rate. Nothing to save: a resumed run computes the same numbers again."""

    warmup_steps: Annotated[int, Ge(0)] = 0
    """Steps over which the factor first rises linearly: step s of w has (s + 1) / w."""

    def factor(self, step: int, progress: float) -> float:
        """Factor of step `step` (0 is the first), where `progress` in [0, 1] is the share of the run done before it."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.decay(progress)

    def decay(self, progress: float) -> float:
        """Factor once the warm-up is over."""
        raise AssertionError(f"{type(self).__name__} has no decay")
