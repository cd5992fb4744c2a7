"""SIGTERM and SIGINT become a question that the loop asks between two steps."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any


class StopSignals:
    """Remembers the signal that asked the run to stop; the handlers before it are back after the block.

    A second SIGINT raises KeyboardInterrupt at once: the person does not want to wait for the step and its checkpoint.

    >>> with StopSignals() as stop:
    ...     stop.requested()      # None, or "SIGTERM"

    Args:
        silent: does not say that a signal came: another rank does.
    """

    def __init__(self, *, silent: bool = False) -> None:
        self._silent = silent
        self._name: str | None = None
        self._interrupts = 0
        self._before: dict[signal.Signals, Any] = {}

    def requested(self) -> str | None:
        """Name of the first signal that came, for example `SIGTERM`; None if none did."""
        return self._name

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        first, self._name = self._name is None, self._name or signal.Signals(number).name
        if first and not self._silent:
            again = "; once more stops at once" if number == signal.SIGINT else ""
            os.write(2, f"{self._name}: stopping after this step, with a checkpoint{again}\n".encode())
