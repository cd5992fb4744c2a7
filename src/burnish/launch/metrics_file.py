"""`metrics.jsonl` and the way all of a run's JSON-lines files are written.

Floats are written by `repr`, so they come back bit for bit. JSON has no NaN and no infinity: they are written as the
strings "NaN", "Infinity" and "-Infinity", which `float()` understands; `read_metrics` does that. Must not know what
the metrics mean.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class JsonLines:
    """Appends one JSON object a line, each in the file as soon as it is appended.

    Never fails a run: what a full disk refuses stays in memory and is written before the next line, so the file has
    neither torn lines nor gaps once there is room again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        size = os.fstat(self._file).st_size
        torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"
        self._pending = b"\n" if torn else b""
        self._lock = threading.Lock()  # threads beside training have events of their own

    def append(self, record: Mapping[str, Any], *, durable: bool = False) -> bool:
        """Whether the line is in the file now; with `durable`, on the disk."""
        line = to_json(record).encode() + b"\n"
        with self._lock:
            self._pending += line
            try:
                while self._pending:
                    self._pending = self._pending[os.write(self._file, self._pending) :]
                if durable:
                    os.fsync(self._file)
            except OSError:
                return False
            return True

    def close(self) -> None:
        os.close(self._file)


class MetricsFile:
    """`metrics.jsonl`: one object a step, `{"step": 7, "loss": 2.302585092994046, ...}`."""

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._lines.append({"step": step, **metrics})

    def cut(self, step: int) -> None:
        """Drops what a run that goes on after `step` finished steps will write again, and a torn line; atomic.

        `cut(0)` leaves an empty file: the run begins anew, the evaluation before its first step included.
        """
        path = self._lines.path
        kept = []
        with open(path, "rb") as file:
            for line in file:
                record = _parse(line)
                if step > 0 and record is not None and record["step"] <= step:
                    kept.append(line)
        self.close()
        write_atomically(path, b"".join(kept))
        self._lines = JsonLines(path)

    def close(self) -> None:
        self._lines.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, with its floats as they were; a torn last line is left out."""
    with open(path, "rb") as file:
        records = [record for line in file if (record := _parse(line)) is not None]
    return [{name: float(value) if isinstance(value, str) else value for name, value in r.items()} for r in records]


def to_json(value: Any) -> str:
    """One line of strict JSON; see the module's docstring for NaN and infinity."""
    return json.dumps(_legal(value), allow_nan=False)


def write_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replaces a file: a reader, or the next start after a power cut, sees the old bytes or the new ones.

    Raises:
        OSError: nothing was replaced.
    """
    fresh = path.with_name(path.name + ".tmp")
    with open(fresh, "wb") as file:
        file.write(data)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    os.replace(fresh, path)
    if durable:
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _legal(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _legal(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_legal(item) for item in value]
    return value


def _parse(line: bytes) -> dict[str, Any] | None:
    """None for a line that the end of a process tore."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
