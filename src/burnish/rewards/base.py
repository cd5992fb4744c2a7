"""What a reward is: a number for a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Protocol

from annotated_types import Ge, Gt

from burnish.component import Component
from burnish.errors import UserError


class LiveReward(Protocol):
    """A reward ready to be asked. The signature is TRL's, whose reward functions therefore serve unchanged."""

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[float]:
        """One number for each completion.

        Args:
            prompts: strings, or lists of messages, or lists of item names.
            completions: what was answered, in the same form.
            columns: the other columns of the rows, a list each; and `completion_ids`, the sampled token ids, and
                `finish_reason`, "stop" or "length".
        """
        ...


class Reward(Component):
    """Scores completions, chosen by `reward: {type: ...}`."""

    name: str | None = None
    """What its metric is called; absent: its type, numbered where that is taken."""
    weight: float = 1.0
    """Factor in the sum that advantages are made of."""
    seconds: Annotated[float, Gt(0)] = 10.0
    """Longest that it may take for the rollouts of a group; beyond, its process is killed, and each is asked alone."""
    failed_value: float = 0.0
    """What a rollout gets where the reward hung, raised, or said no number; counted in `reward_failures`."""
    memory_mib: Annotated[int, Ge(1)] | None = None
    """What one call may allocate beyond what its process holds already; more raises MemoryError in it. Linux only."""

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """Columns that rows must have for it, known before anything runs."""
        return ()

    def open(self) -> LiveReward:
        """Loads what is needed. Raises UserError where it cannot be."""
        raise AssertionError(f"{type(self).__name__} cannot be opened")


def term_names(rewards: Sequence[Reward]) -> list[str]:
    """What their metrics are called: `name`, or the type, numbered where that is taken.

    >>> term_names([Regex(pattern="a"), Regex(pattern="b"), Regex(pattern="c", name="style")])
    ['regex', 'regex_2', 'style']

    Raises:
        UserError: two have the same `name`.
    """
    names = [reward.name for reward in rewards]
    for name in names:
        if name is not None and names.count(name) > 1:
            raise UserError(f"two are called '{name}'", where="workflow.rewards", cure="give each a `name` of its own")
    taken = {name for name in names if name is not None}
    for index, reward in enumerate(rewards):
        if names[index] is None:
            names[index] = free_name(reward.type.rpartition(":")[2], taken)
            taken.add(str(names[index]))
    return [str(name) for name in names]


def free_name(name: str, taken: set[str]) -> str:
    """`name`, or the first of `name_2`, `name_3`... that nothing is called."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free
