"""`python scripts/prepare.py`: the model and the rows of the shipped recipes, into `.cache/`."""

from __future__ import annotations

from pathlib import Path

import quickstart_data
import quickstart_model

MODEL = Path(".cache/models/SmolLM2-135M-Instruct")
DATA = Path(".cache/quickstart")

if __name__ == "__main__":
    print(f"model      {MODEL}: {quickstart_model.prepare(MODEL)}")
    counts = quickstart_data.prepare_all(DATA)
    print(f"data       {DATA}: {', '.join(f'{count} {kind}' for kind, count in counts.items())}")
