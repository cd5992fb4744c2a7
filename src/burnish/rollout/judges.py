"""What a collector asks what rollouts are worth, and what their environment answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from burnish.rewards.pool import Draft
    from burnish.rollouts import Prompt


class Judges(Protocol):
    """What computes rewards and environments beside the collector; see `rewards.pool.RewardPool`."""

    def score(self, key: str, prompt: Prompt, drafts: Sequence[Draft]) -> None: ...

    def reset(self, key: str, row: dict[str, Any], seed: int) -> None: ...

    def step(self, key: str, state: Any, action: str) -> None: ...

    def poll(self, seconds: float) -> list[tuple[Any, Any]]: ...

    def abort(self) -> None: ...

    def misspoken(self, where: str, why: str) -> None: ...

    def facts(self) -> dict[str, float]: ...

    @property
    def num_unfinished(self) -> int: ...

    @property
    def signs_of_life(self) -> int: ...
