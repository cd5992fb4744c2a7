"""Checkpoints that survive a power cut and notice a flipped bit: safetensors and JSON, no pickle."""

from burnish.policy.checkpoint.checkpointer import Checkpointer
from burnish.policy.checkpoint.outcome import Saved, SaveFailed
from burnish.policy.checkpoint.piece import Piece
from burnish.policy.checkpoint.place import LocalPlace, Place
from burnish.policy.checkpoint.reader import LoadedCheckpoint, load_latest
from burnish.policy.checkpoint.storage import Storage

__all__ = [
    "Checkpointer",
    "LoadedCheckpoint",
    "LocalPlace",
    "Piece",
    "Place",
    "SaveFailed",
    "Saved",
    "Storage",
    "load_latest",
]
