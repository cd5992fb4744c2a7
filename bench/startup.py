"""How long a person waits: for help, for a mistake in the recipe, for a whole check.

python -m bench.startup
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.report import report

RECIPE = "recipes/quickstart.yaml"
REPEATS = 5


def seconds(arguments: list[str], expected: int) -> float:
    """Least wall time of a whole command; its exit code must be the expected one."""
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "burnish", *arguments], capture_output=True, text=True)
        times.append(time.perf_counter() - started)
        assert done.returncode == expected, done.stderr
    return min(times)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        wrong = Path(folder) / "wrong.yaml"
        wrong.write_text(Path(RECIPE).read_text().replace("learning_rate:", "learning_rte:"))
        rows = [
            {"command": "burnish --help", "seconds": seconds(["--help"], 0), "asked": 0.7},
            {"command": "burnish check, misspelt key", "seconds": seconds(["check", str(wrong)], 2), "asked": 4.0},
            {"command": f"burnish check {RECIPE}", "seconds": seconds(["check", RECIPE], 0), "asked": 20.0},
        ]
    report("startup", rows)


if __name__ == "__main__":
    main()
