"""Weights through this machine's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from burnish.rollout.sync.base import WeightSync

if TYPE_CHECKING:
    from pathlib import Path

    from burnish.rollout.sync.base import Receiver, Sender


class SharedMemory(WeightSync):
    """A safetensors file in `/dev/shm` (the folder for temporary files, where there is none), which engines on the same
    machine map. It holds two versions, and a third while that is written."""

    type: Literal["shared_memory"] = "shared_memory"

    def sender(self, run_dir: Path) -> Sender:
        from burnish.rollout.weights_file import FolderSender
        from burnish.rollout.weights_place import claim_memory

        root, release = claim_memory()
        return FolderSender(root, durable=False, release=release)

    def receiver(self) -> Receiver:
        from burnish.rollout.weights_file import FolderReceiver

        return FolderReceiver(mapped=True)
