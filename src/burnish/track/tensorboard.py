"""TensorBoard event files in the run folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from burnish.errors import UserError
from burnish.track.base import Tracker

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)


class TensorBoard(Tracker):
    """Scalars by step, and the resolved recipe as text. `tensorboard --logdir runs` shows all runs below `runs`."""

    type: Literal["tensorboard"] = "tensorboard"
    log_dir: str = "tensorboard"
    """Where the event files go: below the run folder, or anywhere with an absolute path."""

    def open(self, run_dir: Path, step: int, recipe: Mapping[str, Any]) -> LiveTensorBoard:
        """Starts after `step` finished steps; TensorBoard hides what an earlier process logged beyond them.

        Raises:
            UserError: the package is missing, or the folder cannot be written.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"the tensorboard package is not usable: {error}",
                where="track: {type: tensorboard}",
                cure="pip install 'burnish[tensorboard]', or take this tracker out of the recipe",
            ) from error
        # Points at purge_step and after are hidden; 0 hides the evaluation before the first step too.
        purge_step = step + 1 if step > 0 else 0
        try:
            writer = SummaryWriter(str(run_dir / self.log_dir), purge_step=purge_step)
        except OSError as error:
            raise UserError(
                f"cannot write event files: {error}",
                where="track: {type: tensorboard}",
                cure="give a log_dir that can be written",
            ) from error
        live = LiveTensorBoard(writer)
        live.log_recipe(recipe, step)
        return live


class LiveTensorBoard:
    """An open event file; the first failure is logged, and then it is silent: tracking never ends a run."""

    def __init__(self, writer: SummaryWriter) -> None:
        self._writer: SummaryWriter | None = writer

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._writer is None:
            return
        try:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
            # The writer's own 120 s would lose two minutes of points that a killed run will not make again.
            self._writer.flush()
        except Exception as error:  # whatever its thread met, kept by the package for the next call
            self._give_up(error)

    def log_recipe(self, recipe: Mapping[str, Any], step: int) -> None:
        """The recipe as a text that TensorBoard shows in a fixed-width font (Markdown: four spaces)."""
        assert self._writer is not None
        lines = json.dumps(recipe, indent=2, default=str).splitlines()
        try:
            self._writer.add_text("recipe", "\n".join("    " + line for line in lines), step)
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        logger.warning("tensorboard: %s; nothing more is logged there in this run", error)
        self._writer = None
