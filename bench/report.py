"""What every benchmark ends with: a table for people, and the same rows as JSON with the machine they came from."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def report(name: str, rows: list[dict[str, Any]]) -> None:
    """Prints `rows` as a table (columns: the keys, in order of appearance) and writes `bench/results/<name>.json`.

    The JSON is `{"name", "measured", "machine": {...}, "rows": [...]}`; floats are written in full.
    """
    table = Table(title=name)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(_text(row.get(column, "")) for column in columns))
    Console(width=None if os.isatty(1) else 160).print(table)
    RESULTS.mkdir(exist_ok=True)
    result = {"name": name, "measured": datetime.now(UTC).date().isoformat(), "machine": machine(), "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")


def machine() -> dict[str, Any]:
    """Processor, cores in use, accelerator, and the versions that the figures depend on."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }
    for package in ("torch", "transformers", "tokenizers", "numpy"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    import torch

    facts["torch_threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name()
    return facts


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
