"""What every supervised launch has in a recipe, and how it runs one: several ranks, watched and restarted.

A launch of this kind adds where its ranks are started (`backend`). Must not know how that is done.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, TextIO

from annotated_types import Ge, Gt
from pydantic import model_validator
from pydantic_core import PydanticCustomError

from burnish.component import Config
from burnish.errors import RecipeError, UserError
from burnish.launch.base import Launch

if TYPE_CHECKING:
    from burnish.launch.worker_group import Backend
    from burnish.recipe import Recipe


class Elastic(Config):
    """Between how many ranks a run may go on."""

    min_workers: Annotated[int, Ge(1)]
    """With fewer than this it waits for more, `start_seconds` long."""
    max_workers: Annotated[int, Ge(1)]
    """It grows to at most this many where there is room."""


class Supervised(Launch):
    """Several ranks, watched: when one dies or hangs, all are restarted from the last checkpoint."""

    num_workers: Annotated[int, Ge(1)]
    """Ranks that the run is started with."""
    max_restarts: Annotated[int, Ge(0)] = 10
    """Restarts without a new checkpoint between them before the run is given up."""
    heartbeat_seconds: Annotated[float, Gt(0)] = 300.0
    """A rank that is silent for so long is taken for hung: its stacks are saved and all ranks restarted. Longer than
    the longest micro-batch."""
    start_seconds: Annotated[float, Gt(0)] = 600.0
    """The same from a rank's start to its first step, while it loads the model."""
    grace_seconds: Annotated[float, Gt(0)] = 30.0
    """After SIGTERM or SIGINT the ranks have so long to finish their step and write a checkpoint. Shorter than the
    cluster's own time between SIGTERM and SIGKILL."""
    elastic: Elastic | None = None
    """Go on with fewer ranks while some cannot be had, and with more when they are back; absent: always `num_workers`.
    """

    @model_validator(mode="after")
    def _workers_are_within(self) -> Self:
        if self.elastic is not None:
            low, high = self.elastic.min_workers, self.elastic.max_workers
            if not low <= self.num_workers <= high:
                raise PydanticCustomError(
                    "workers",
                    "num_workers {given} is not within elastic's {low} to {high}",
                    {"given": self.num_workers, "low": low, "high": high},
                )
        return self

    def backend(self, recipe: Recipe, work: Callable[[Callable[[str], None]], int], largest: int) -> Backend:
        """Where ranks are started.

        Args:
            work: what each rank does, picklable; it is handed the function to call at every sign of life.
            largest: the most ranks of an attempt.
        """
        raise AssertionError(f"{type(self).__name__} starts no ranks")

    def run(self, recipe: Recipe, *, json_lines: bool = False) -> int:
        """Trains to the end and exports, however often ranks die on the way."""
        from burnish.launch.attempt import Limits
        from burnish.launch.signals import StopSignals
        from burnish.launch.supervise import Supervisor

        worlds = valid_worlds(recipe, self)
        limits = Limits(self.max_restarts, self.heartbeat_seconds, self.start_seconds, self.grace_seconds)
        run_dir = Path(recipe.run_dir)
        with StopSignals() as stop:
            backend = self.backend(recipe, partial(train, recipe, json_lines), worlds[-1])
            try:
                return Supervisor(
                    backend,
                    worlds,
                    self.num_workers,
                    limits,
                    FolderReport(run_dir, json_lines=json_lines),
                    progress=lambda: newest_checkpoint(run_dir, recipe.checkpoint.store),
                    stop_requested=stop.requested,
                ).run()
            finally:
                backend.close()


def train(recipe: Recipe, json_lines: bool, beat: Callable[[str], None]) -> int:
    """The work of one rank."""
    from burnish.launch.rank import run_rank

    return run_rank(recipe, json_lines=json_lines, beat=beat)


def valid_worlds(recipe: Recipe, launch: Supervised) -> list[int]:
    """Numbers of ranks that the run may have, ascending.

    Raises:
        RecipeError: `num_workers` is not one of them.
    """
    from burnish.launch.layout import misfits

    refused = misfits(recipe, launch.num_workers)
    if refused:
        raise RecipeError(tuple(UserError(m.reason, where=".".join(map(str, m.path)), cure=m.cure) for m in refused))
    if launch.elastic is None:
        return [launch.num_workers]
    sizes = range(launch.elastic.min_workers, launch.elastic.max_workers + 1)
    return [size for size in sizes if not misfits(recipe, size)]


def newest_checkpoint(run_dir: Path, store: str | None = None) -> int:
    """Step of the newest complete checkpoint; -1: there is none, or the store does not answer."""
    if store is not None:
        from burnish.launch.stored_run import open_store

        with contextlib.suppress(OSError):
            return max(open_store(store, run_dir).steps(), default=-1)
        return -1
    names = (path.parent.name.removeprefix("checkpoint-") for path in run_dir.glob("checkpoint-*/manifest.json"))
    return max((int(name) for name in names if name.isdecimal()), default=-1)


class FolderReport:
    """What supervision says: the run's events and stacks, and lines for whoever watches.

    Rank 0 owns the run folder and appends to the same events, so nothing is held open here between two lines.
    """

    def __init__(self, run_dir: Path, *, json_lines: bool, output: TextIO | None = None) -> None:
        self._run_dir, self._json_lines = run_dir, json_lines
        self._output = sys.stdout if output is None else output

    def event(self, kind: str, **facts: Any) -> None:
        """Appends to `events.jsonl`."""
        from burnish.launch.run_folder import RunFolder

        self._run_dir.mkdir(parents=True, exist_ok=True)
        folder = RunFolder(self._run_dir)
        folder.event(kind, **facts)
        folder.close()

    def note(self, text: str) -> None:
        """A line of its own, also where a dead rank has left a progress bar and a hidden cursor."""
        from burnish.launch.metrics_file import to_json

        line = to_json({"note": text}) if self._json_lines else text
        start = "\r\x1b[K\x1b[?25h" if self._output.isatty() else ""
        with contextlib.suppress(OSError):  # a closed pipe, a terminal that is gone: a run does not end for it
            print(start + line, file=self._output, flush=True)

    def stacks(self, rank: int, attempt: int, text: str) -> str:
        """Into `stacks-rank<rank>-<attempt>.txt`; a later run's with the same numbers follow behind."""
        name = f"stacks-rank{rank}-{attempt}.txt"
        self._run_dir.mkdir(parents=True, exist_ok=True)
        with open(self._run_dir / name, "a", encoding="utf-8") as file:
            file.write(f"# {time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n{text}")
        return name
