"""What an advantage estimator is: from the rewards of a step to a number for each sampled token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from burnish.component import Component

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scored:
    """All rollouts of a step, of all ranks, in order: N rollouts with A sampled tokens in all, laid end to end.

    Two groups of two rollouts, of 3, 1, 2 and 2 sampled tokens:

        rewards   [1., 0., 2., 2.]                   float64 [N]
        groups    [0, 0, 1, 1]                       int64 [N]
        lengths   [3, 1, 2, 2]                       int64 [N]; A = 8
        penalties [.1, 0, .2,  .1,  0, 0,  .3, 0]    float64 [A], or None: subtracted from each token's reward (KL)
        values    [...]                              float64 [A], or None: V before each token was drawn

    What stands between two turns of a rollout is not here: returns are carried over it.
    """

    rewards: Tensor
    groups: Tensor
    lengths: Tensor
    penalties: Tensor | None = None
    values: Tensor | None = None


class Advantages(NamedTuple):
    """float64 [A] each."""

    advantages: Tensor
    returns: Tensor | None = None
    """What a value head learns; only of estimators that use one."""


class Advantage(Component):
    """Chosen by `workflow.advantage: {type: ...}`. Pure: every rank computes it of all rollouts."""

    @property
    def needs_values(self) -> bool:
        """Whether a value head must say `Scored.values`."""
        return False

    @property
    def needs_group(self) -> bool:
        """Whether a rollout is compared with others of its prompt, so that a group of one teaches nothing."""
        return False

    def __call__(self, scored: Scored) -> Advantages:
        raise AssertionError(f"{type(self).__name__} is not callable")
