"""Weights through files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import MinLen

from burnish.rollout.sync.base import WeightSync

if TYPE_CHECKING:
    from pathlib import Path

    from burnish.rollout.sync.base import Receiver, Sender


class File(WeightSync):
    """A safetensors file in a folder that trainer and engines see, on one machine or on many. It appears under its name
    once it is whole and on the disk."""

    type: Literal["file"] = "file"
    folder: Annotated[str, MinLen(1)] | None = None
    """Where; each run has a folder of its own in it. By default `weights` in the run folder."""

    def sender(self, run_dir: Path) -> Sender:
        from burnish.rollout.weights_file import FolderSender
        from burnish.rollout.weights_place import claim_folder

        return FolderSender(claim_folder(run_dir, self.folder), durable=True)

    def receiver(self) -> Receiver:
        from burnish.rollout.weights_file import FolderReceiver

        return FolderReceiver(mapped=False)
