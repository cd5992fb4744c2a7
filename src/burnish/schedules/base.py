"""What a schedule is: a factor on the learning rate, a pure function of progress."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge

from burnish.component import Component


class Schedule(Component):
    """Factor in [0, 1] on every learning rate. Nothing to save: a resumed run computes the same numbers again."""

    warmup_steps: Annotated[int, Ge(0)] = 0
    """Steps over which the factor first rises linearly: step s of w has (s + 1) / w."""

    def factor(self, step: int, progress: float, num_steps: int | None) -> float:
        """Factor of step `step` (0 is the first).

        The decay begins where the warm-up ends: of 20 steps with 5 of warm-up, step 5 has the decay's first value.
        Where epochs say the length of the run its steps are not known, and the decay runs beside the warm-up.

        Args:
            progress: share of the run done before this step, in [0, 1].
            num_steps: steps of the whole run; None where epochs say its length.
        """
        rising = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if num_steps is None:
            return rising * self.decay(progress)
        if step < self.warmup_steps:
            return rising
        return self.decay((step - self.warmup_steps) / (num_steps - self.warmup_steps))

    def decay(self, progress: float) -> float:
        """Factor at `progress` in [0, 1] of what follows the warm-up."""
        raise AssertionError(f"{type(self).__name__} has no decay")
