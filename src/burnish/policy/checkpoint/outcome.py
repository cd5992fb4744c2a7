"""How a save ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint is complete and durable."""

    kind: ClassVar[str] = "checkpoint_saved"
    step: int
    place: str
    """Where it lies, for a person: `runs/sft/checkpoint-20`"""
    num_bytes: int
    """Of all ranks."""
    seconds: float
    """In the background: the slowest rank's, from the end of its copy until its files were durable, and the commit."""
    note: str = ""
    """What went wrong afterwards: an old checkpoint that could not be deleted."""

    def facts(self) -> dict[str, Any]:
        """For the event log."""
        return {"step": self.step, "bytes": self.num_bytes, "seconds": self.seconds, "note": self.note}


@dataclass(frozen=True, slots=True)
class SaveFailed:
    """The disk refused; the run goes on, and the checkpoints before are as they were."""

    kind: ClassVar[str] = "checkpoint_failed"
    step: int
    reason: str

    def facts(self) -> dict[str, Any]:
        """For the event log."""
        return {"step": self.step, "reason": self.reason}
