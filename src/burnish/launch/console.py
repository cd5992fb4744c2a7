"""What a run shows on the screen: a progress bar on a terminal, plain lines in a pipe, JSON lines for a program.

Must not know where the metrics come from. rich is imported on a terminal only (0.2 s).
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol, TextIO

from burnish.launch.metrics_file import to_json

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

_SHOWN = {
    "reward": ("reward", "{:.4f}"),
    "eval_reward": ("eval_reward", "{:.4f}"),
    "loss": ("loss", "{:.4f}"),
    "eval_loss": ("eval_loss", "{:.4f}"),
    "eval_mrr": ("eval_mrr", "{:.4f}"),
    "grad_norm": ("grad_norm", "{:.3g}"),
    "learning_rate": ("lr", "{:.2e}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "mfu": ("mfu", "{:.1%}"),
}


class Console:
    """The display of one run. Notes stand out from the steps and are always shown.

    Never fails a run: once the output refuses a line (`burnish train r.yaml | head`, a log on a full disk, a terminal
    that is gone), nothing more is shown. A character that it cannot show is written as in Python, `\\udc80`.

    Args:
        total_steps: steps of the whole run; None where epochs say its length.
        json_lines: one JSON object a line, whatever the output is.
        every_seconds: in a pipe, the least time between two lines; the first and the last step and every evaluation
            are always shown.
    """

    def __init__(
        self,
        total_steps: int | None,
        *,
        json_lines: bool = False,
        output: TextIO | None = None,
        every_seconds: float = 2.0,
    ) -> None:
        to = sys.stdout if output is None else output
        if isinstance(to, io.TextIOWrapper):  # an event may hold a model's words, and a log be of Latin-1
            to.reconfigure(errors="backslashreplace")
        self._output = to
        self._display: _Display | None
        if json_lines:
            self._display = _Json(to)
        elif to.isatty():
            self._display = _Bar(to, total_steps)
        else:
            self._display = _Lines(to, total_steps, every_seconds)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A finished step, counted from 1; 0 is what was measured before the first."""
        if self._display is not None:
            with self._silenced():
                self._display.step(step, metrics)

    def note(self, text: str) -> None:
        """A sentence for the person who watches."""
        if self._display is not None:
            with self._silenced():
                self._display.note(text)

    def close(self) -> None:
        if self._display is not None:
            with self._silenced():
                self._display.close()

    @contextlib.contextmanager
    def _silenced(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._display = None
            # What the stream still holds must go somewhere, or Python fails on it at exit and says so with code 120.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._output.fileno())
            os.close(nowhere)


class _Display(Protocol):
    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class _Json:
    def __init__(self, output: TextIO) -> None:
        self._output = output

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        print(to_json({"step": step, **metrics}), file=self._output, flush=True)

    def note(self, text: str) -> None:
        print(to_json({"note": text}), file=self._output, flush=True)

    def close(self) -> None:
        pass


class _Lines:
    def __init__(self, output: TextIO, total_steps: int | None, every_seconds: float) -> None:
        self._output, self._total, self._every = output, total_steps, every_seconds
        self._eta = _Eta(total_steps)
        self._shown_at = -float("inf")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        left = self._eta.after(step)
        now = time.monotonic()
        if now - self._shown_at < self._every and step != self._total and "eval_loss" not in metrics:
            return
        self._shown_at = now
        count = f"{step}/{self._total}" if self._total is not None else f"{step}"
        eta = f"  eta {_clock(left)}" if left is not None else ""
        print(f"step {count}  {summary(metrics)}{eta}", file=self._output, flush=True)

    def note(self, text: str) -> None:
        print(text, file=self._output, flush=True)

    def close(self) -> None:
        pass


class _Bar:
    def __init__(self, output: TextIO, total_steps: int | None) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TextColumn

        columns: list[ProgressColumn] = [
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[eta]}"),
            TextColumn("{task.fields[summary]}"),
            BarColumn(bar_width=10),
        ]
        self._total, self._eta = total_steps, _Eta(total_steps)
        # Redrawn when a step ends and not by a thread of its own, which would take the interpreter from the training.
        self._progress = Progress(*columns, console=RichConsole(file=output), auto_refresh=False)
        self._task = self._progress.add_task("", total=total_steps, count="0", summary="", eta="")
        self._progress.start()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        left = self._eta.after(step)
        count = f"{step}/{self._total}" if self._total is not None else f"{step}"
        eta = f"eta {_clock(left)}" if left is not None else ""
        if "eval_loss" in metrics:
            self.note(f"step {count}  {summary(metrics)}")
        short = summary({name: metrics[name] for name in ("loss", "tokens_per_second", "mfu") if name in metrics})
        self._progress.update(self._task, completed=step, count=count, summary=short, eta=eta)
        self._progress.refresh()

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()


class _Eta:
    """Seconds left, from the mean of the steps that this process has made."""

    def __init__(self, total_steps: int | None) -> None:
        self._total = total_steps
        self._first: tuple[int, float] | None = None

    def after(self, step: int) -> float | None:
        now = time.monotonic()
        self._first = self._first or (step, now)
        first, since = self._first
        if self._total is None or step == first:
            return None
        return (now - since) / (step - first) * (self._total - step)


def summary(metrics: Mapping[str, float]) -> str:
    """`loss 2.3026  lr 1.00e-04  tokens/s 105  mfu 41.0%`: those of the well-known metrics that there are."""
    shown = ((label, form.format(metrics[name])) for name, (label, form) in _SHOWN.items() if name in metrics)
    return "  ".join(f"{label} {value}" for label, value in shown)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
