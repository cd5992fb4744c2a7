"""`python -m bench [NAME ...]`: every benchmark, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

names = sys.argv[1:] or sorted(p.stem for p in Path(__file__).parent.glob("[a-z]*.py") if p.stem != "report")
sys.exit(max(subprocess.run([sys.executable, "-m", f"bench.{name}"]).returncode for name in names))
