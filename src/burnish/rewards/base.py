"""What a reward is: a number for a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from burnish.component import Component


class LiveReward(Protocol):
    """A reward ready to be asked. The signature is TRL's, whose reward functions therefore serve unchanged."""

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[float]:
        """One number for each completion.

        Args:
            prompts: strings, or lists of messages.
            completions: what was answered, in the same form.
            columns: the other columns of the rows, a list each.
        """
        ...


class Reward(Component):
    """Scores completions, chosen by `reward: {type: ...}`."""

    def open(self) -> LiveReward:
        """Loads what is needed. Raises UserError where it cannot be."""
        raise AssertionError(f"{type(self).__name__} cannot be opened")
