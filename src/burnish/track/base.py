"""What a tracker is: somewhere that metrics go."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from burnish.component import Component


class LiveTracker(Protocol):
    """An open tracker. A tracker that fails must not end a run: it reports once and stays silent."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a finished step; the first step is 1."""
        ...

    def close(self) -> None: ...


class Tracker(Component):
    """Describes where metrics go besides `metrics.jsonl`, which every run writes."""

    def open(self, run_dir: Path, step: int, recipe: Mapping[str, Any]) -> LiveTracker:
        """Starts or continues tracking after `step` finished steps; what was logged beyond that step is dropped."""
        raise AssertionError(f"{type(self).__name__} cannot be opened")
