"""Weights over the network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt, MinLen

from burnish.rollout.sync.base import WeightSync

if TYPE_CHECKING:
    from pathlib import Path

    from burnish.rollout.sync.base import Receiver, Sender


class Broadcast(WeightSync):
    """Sent by gloo to all engines that ask, on any machine, out of the trainer's memory, which holds two versions. The
    trainer goes on meanwhile."""

    type: Literal["broadcast"] = "broadcast"
    host: Annotated[str, MinLen(1)] = "127.0.0.1"
    """The trainer's address that engines reach it at. Whoever reaches it can read the weights: keep it in a network
    that you trust."""
    deadline_seconds: Annotated[float, Gt(0)] = 300.0
    """An engine that lacks the weights after so long says so."""

    def sender(self, run_dir: Path) -> Sender:
        from burnish.rollout.weights_broadcast import BroadcastSender

        return BroadcastSender(self.host, self.deadline_seconds)

    def receiver(self) -> Receiver:
        from burnish.rollout.weights_broadcast import BroadcastReceiver

        return BroadcastReceiver(self.deadline_seconds)
