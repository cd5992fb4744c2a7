"""What a run takes its steps from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from burnish.mesh import Mesh


class Feed(Protocol):
    """What a step is made of, in the run's order: packed rows of the data, or groups of the policy's own rollouts."""

    wait_seconds: float
    """Total time that `take` waited."""

    def take(self, count: int, /) -> list[Any]:
        """The next ones; none at the end of the run. Raises UserError: one of them cannot be used."""
        ...

    @property
    def over(self) -> bool:
        """Whether all were taken."""
        ...

    def progress(self) -> float | None:
        """Share that was consumed; None where there is no end."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON: what was consumed; `together` makes one of all ranks', which each of them can `load`."""
        ...

    def together(self, mesh: Mesh, mine: dict[str, Any]) -> dict[str, Any]:
        """The state of the run on rank 0, from every rank's."""
        ...

    def load(self, state: dict[str, Any]) -> None: ...

    def ledger_state(self) -> dict[str, Any]: ...

    def ledger(self, states: Sequence[dict[str, Any]] | None = None) -> dict[str, Any]: ...
