"""The environment that vLLM's tests run in: a process of its own, because vLLM takes threads, loggers and process
groups for itself, and packages of its own, because TRL and transformers would import vLLM wherever they find it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".vllm" / "bin" / "python"
needs_vllm = pytest.mark.skipif(not PYTHON.exists(), reason="vLLM is not installed for CPUs: `make .vllm`")
HEAD_DIM = 32
"""The smallest that vLLM's attention for CPUs has a kernel for."""


def run_with_vllm(arguments: Sequence[str], seconds: float) -> str:
    """Output of `python ...` in that environment; fails the test with the output where it fails."""
    process = subprocess.run(
        [str(PYTHON), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
    )
    assert process.returncode == 0, process.stdout[-6000:]
    return process.stdout
