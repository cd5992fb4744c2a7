"""How a version of the policy travels from the trainer to engines in other processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from burnish.component import Component
from burnish.rollout.fleet import idle

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from burnish.rollout.engine import Weights


class Sender(Protocol):
    """The trainer's end of a transport."""

    def send(
        self, version: int, tensors: Iterator[tuple[str, Tensor]], *, adapter_only: bool, folder: Path | None
    ) -> dict[str, Any]:
        """Makes a version available and returns the parcel, JSON: what a receiver needs to find it. The version before
        stays available until `forget`.

        Raises:
            SyncFailed: a full disk, a peer that does not take part in time.
        """
        ...

    def forget(self, version: int) -> None:
        """Nobody will ask for versions before this one any more."""
        ...

    def close(self) -> None: ...


class Receiver(Protocol):
    """A worker's end."""

    def receive(self, parcel: dict[str, Any], alive: Callable[[], None] = idle) -> Weights:
        """The version of a parcel.

        Args:
            alive: called again and again while bytes come, here and in the weights' `folder`; not while none come.

        Raises:
            SyncFailed: stale, partial, swapped or not there.
        """
        ...

    def close(self) -> None: ...


class WeightSync(Component):
    """A transport, chosen by `rollout.sync: {type: ...}`."""

    def sender(self, run_dir: Path) -> Sender:
        """In the trainer."""
        raise AssertionError(f"{type(self).__name__} cannot send")

    def receiver(self) -> Receiver:
        """In a worker, from this component alone; pickled there."""
        raise AssertionError(f"{type(self).__name__} cannot receive")
