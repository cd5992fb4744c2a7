"""Steps whose loss or gradient is wrong: which they are, and what becomes of them.

Pure arithmetic on two numbers that are the same on every rank, asked between the last backward pass of a step and the
optimizer. Here is no file and no tensor: the state rides in the checkpoint, and the list of steps that a rollback
passes over is to be written down before the rollback, so that a run that is killed meanwhile does the same again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Gt

from burnish.component import Config

LEAST_SPREAD = 0.01
"""Of the mean, as a standard deviation: a run that is done learning says 2.0001, 2.0002, and 2.01 is no spike there."""

Action = Literal["skip", "rollback", "stop"]


class Anomaly(Config):
    """What becomes of a step whose loss or gradient is not finite, or whose loss leaps."""

    action: Action = "skip"
    """`skip`: nothing moves, the next rows follow. `rollback`: back to a checkpoint from before the step, and on from
    there without the rows of this step and of `steps_before`. `stop`: the run ends; its checkpoints are from before."""
    max_bad_steps: Annotated[int, Ge(1)] = 3
    """Bad steps in a row that end the run under any action: one is a bad row, three are a diverged model."""
    steps_before: Annotated[int, Ge(0)] = 1
    """Steps before the bad one whose rows a rollback passes over too: a loss leaps when its rows are bad, or when the
    step before it went wrong. At 0 a rollback ends where `skip` would."""
    max_rollbacks: Annotated[int, Ge(1)] = 5
    """Rollbacks of the whole run; the next one ends it."""
    sigmas: Annotated[float, Gt(0)] | None = None
    """A loss that is so many standard deviations above the mean of the last `window` good steps is a leap; 6 is rare.
    Absent: only what is not finite is wrong."""
    window: Annotated[int, Ge(2)] = 100
    """Good steps that a loss is compared with; before there have been as many, none is a leap."""


class Verdict(NamedTuple):
    """What is to become of a step."""

    action: Literal["ok"] | Action
    reason: str = ""
    """Why, where it is not ok: `the loss is not finite`."""


OK = Verdict("ok")


class Anomalies:
    """The judge of a run's steps. Steps are counted from 1."""

    def __init__(self, config: Anomaly) -> None:
        self.config = config
        self.bad_steps = 0
        """Bad ones in a row, up to the step before the one at hand."""
        self.rolled_back: dict[int, str] = {}
        """Step -> why the run went back because of it."""
        self._losses: deque[float] = deque(maxlen=config.window)
        self._step, self._before, self._is_bad = 0, 0, False

    def judge(self, step: int, loss: float, grad_norm: float) -> Verdict:
        """What is to become of a step, by its mean loss and the norm of its gradient before clipping.

        To be called for every update of a step, on every rank with the same numbers, and before anything moves. A step
        is bad if one of its updates is.
        """
        if step != self._step:
            self._step, self._before, self._is_bad = step, self.bad_steps, False
        reason = self._wrong(loss, grad_norm)
        if reason is None:
            self.bad_steps = self.bad_steps if self._is_bad else 0
            self._losses.append(loss)
            return OK
        self._is_bad, self.bad_steps = True, self._before + 1
        config = self.config
        if self.bad_steps >= (1 if config.action == "stop" else config.max_bad_steps):
            in_a_row = f", the {_ordinal(self.bad_steps)} step in a row" if self.bad_steps > 1 else ""
            return Verdict("stop", reason + in_a_row)
        if config.action == "skip":
            return Verdict("skip", reason)
        if len(self.rolled_back) == config.max_rollbacks:
            times = f"{config.max_rollbacks} rollback{'s' * (config.max_rollbacks > 1)}"
            return Verdict("stop", f"{reason}, after {times}")
        self.rolled_back[step] = reason
        return Verdict("rollback", reason)

    def pass_over(self, step: int) -> str | None:
        """Why the rows of a step are taken and not trained on; None where they are. To be asked once before each step,
        which counts as done then."""
        if step in self.rolled_back:
            self.bad_steps += 1
            return self.rolled_back[step]
        later = next((bad for bad in self.rolled_back if bad - self.config.steps_before <= step < bad), None)
        return None if later is None else f"before step {later}, where {self.rolled_back[later]}"

    def is_sound(self, num_steps: int, state: Mapping[str, Any]) -> bool:
        """Whether a checkpoint after so many steps, with this `state`, holds nothing that a rollback was to undo: it is
        from before the steps that are passed over, or of a run that has passed over them."""
        known = state.get("rolled_back", {})
        return all(str(step) in known or num_steps < step - self.config.steps_before for step in self.rolled_back)

    def state(self) -> dict[str, Any]:
        """JSON, for a checkpoint."""
        return {"bad_steps": self.bad_steps, "losses": list(self._losses), **self.listed()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Becomes what it was, and keeps what it has been told of rollbacks since."""
        self.bad_steps = state["bad_steps"]
        self._losses.clear()
        self._losses.extend(state.get("losses", ()))
        self.expect(state)

    def listed(self) -> dict[str, Any]:
        """JSON: the rollbacks, to be written down before one takes place; `expect` reads it."""
        return {"rolled_back": {str(step): reason for step, reason in self.rolled_back.items()}}

    def expect(self, listed: Mapping[str, Any]) -> None:
        """Adds rollbacks that were `listed`, by this process or by one that was killed."""
        self.rolled_back |= {int(step): reason for step, reason in listed.get("rolled_back", {}).items()}

    def _wrong(self, loss: float, grad_norm: float) -> str | None:
        if not math.isfinite(loss):
            return "the loss is not finite"
        if not math.isfinite(grad_norm):
            return "the gradient is not finite"
        sigmas, losses = self.config.sigmas, self._losses
        if sigmas is None or len(losses) < self.config.window:
            return None
        mean = math.fsum(losses) / len(losses)
        spread = math.sqrt(math.fsum((x - mean) ** 2 for x in losses) / (len(losses) - 1))
        leap = (loss - mean) / max(spread, LEAST_SPREAD * abs(mean), 1e-12)
        if leap <= sigmas:
            return None
        return (
            f"the loss of {loss:.4g} is {leap:.3g} standard deviations above the {mean:.4g} of the last {len(losses)} "
            "good steps"
        )


def _ordinal(number: int) -> str:
    words = ("zeroth", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
    return words[number] if number < len(words) else f"{number}th"
