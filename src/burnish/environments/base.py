"""What an environment is: what answers the policy between its turns, and may reward it.

Its two functions carry all state in what they return, JSON. So they run in a killable process with a deadline, are
asked again where that process died, and a conversation in flight needs nothing but its state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge, Gt

from burnish.component import Component

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Observation:
    """What the environment makes of a turn.

    >>> Observation([{"role": "tool", "content": "4"}], state={"calls": 1})             # the policy speaks again
    >>> Observation([], state={}, done=True, rewards={"solved": 1.0})                   # the episode is over
    """

    messages: list[Message]
    """What is said to the policy; never trained."""
    state: Any
    """JSON; given back at the next step."""
    done: bool = False
    rewards: dict[str, float] = field(default_factory=dict)
    """By name; those of all steps of an episode are summed, and become terms of its reward with weight 1."""


class Environment(Component):
    """Chosen by `rollout.environment: {type: ...}`; a team's own is `type: my_module:MyEnvironment`."""

    max_turns: Annotated[int, Ge(1)] = 1
    """Turns of the policy in an episode; it is over after the last, whatever the environment would say."""
    seconds: Annotated[float, Gt(0)] = 10.0
    """Longest that one `reset` or `step` may take; beyond, the episode ends where it is and counts as failed."""

    @property
    def is_interactive(self) -> bool:
        """Whether `reset` and `step` are called at all; False: an episode is one turn, and rewards say all."""
        return True

    def reset(self, row: dict[str, Any], seed: int) -> Any:
        """State at the beginning of an episode, from the row's columns. Different for each rollout of a group only
        through `seed`."""
        return None

    def step(self, state: Any, action: str) -> Observation:
        """What follows from a turn.

        Args:
            action: its text, without special tokens; for items their names.
        """
        raise AssertionError(f"{type(self).__name__} cannot step")
