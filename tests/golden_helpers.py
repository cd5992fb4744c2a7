"""The runs whose every loss is kept in tests/numerics/golden/. `python -m tests.golden_helpers` writes them anew."""

from __future__ import annotations

import hashlib
import platform
import tempfile
from pathlib import Path

from tests import tiny_run
from tests.e2e_helpers import Lab
from tests.zygote import Zygote

FOLDER = Path(__file__).parent / "numerics" / "golden"
MODELS = {"full": {}, "lora": {"adapter": {"type": "lora", "r": 4, "lora_alpha": 8}}}
"""No dropout: its random numbers are MKL's where torch was built with it."""

Losses = list[tuple[int, float, float]]


def fingerprint() -> str:
    """What the last bits of a float depend on: the processor's instructions, torch, and the one thread it has."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    facts: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    flags = hashlib.sha256(" ".join(sorted(facts.get("flags", "").split())).encode()).hexdigest()[:12]
    kernels = torch.backends.cpu.get_cpu_capability()
    cpu = " ".join(facts.get(key, "?") for key in ("model name", "cpu family", "model", "stepping"))
    return f"{platform.machine()} {cpu}; flags {flags}; torch {torch.__version__} {kernels}; 1 thread"


def train(zygote: Zygote, folder: Path, name: str) -> Losses:
    """Ten steps on a fresh tiny model."""
    model = tiny_run.write_model(folder / "model")
    rows = tiny_run.write_jsonl(folder / "rows.jsonl", tiny_run.conversations(200))
    lab = Lab(zygote, folder, model, rows)
    return tiny_run.losses(lab.train(name, model=MODELS[name], num_steps=10))


def read(name: str) -> tuple[str, Losses]:
    """(fingerprint of where it was written, losses)."""
    header, *lines = (FOLDER / f"{name}.txt").read_text().splitlines()
    fields = [line.split() for line in lines if not line.startswith("#")]
    return header.removeprefix("# "), [(int(step), float(loss), float(norm)) for step, loss, norm in fields]


def write(name: str, losses: Losses) -> None:
    """Floats as `repr` has them: they come back bit for bit."""
    FOLDER.mkdir(exist_ok=True)
    lines = [f"{step} {loss!r} {norm!r}" for step, loss, norm in losses]
    (FOLDER / f"{name}.txt").write_text("\n".join([f"# {fingerprint()}", "# step loss grad_norm", *lines]) + "\n")


if __name__ == "__main__":
    with Zygote() as zygote:
        for name in MODELS:
            with tempfile.TemporaryDirectory() as folder:
                write(name, train(zygote, Path(folder), name))
            print(FOLDER / f"{name}.txt")
