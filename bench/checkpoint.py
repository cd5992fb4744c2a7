"""How long a checkpoint blocks the training step, beside writing the same bytes: `python -m bench.checkpoint`.

All ways are timed in turn, several rounds, in one process; the first round, with fresh buffers, is shown apart.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from bench.report import report
from burnish.policy.checkpoint import Checkpointer, LocalPlace, Piece, Saved, load_latest
from burnish.policy.checkpoint.manifest import encode_header, tensor_bytes
from burnish.policy.checkpoint.writer import write_part

Tensors = dict[str, torch.Tensor]
Times = dict[str, float]
SYNCHRONOUS = "safetensors save_file + fsync"
UNCHECKED = "burnish, the same files durable without checksums"
CHECKED = "burnish, files durable, checksums in a thread of their own"


def compute(seconds: float) -> float:
    """Stands for a forward and a backward pass: matrix products for `seconds`; returns how many a second."""
    left = torch.randn(512, 512)
    products, begin = 0, time.perf_counter()
    while (now := time.perf_counter()) - begin < seconds:
        torch.mm(left, left)
        products += 1
    return products / (now - begin)


def blocked_seconds(checkpointer: Checkpointer, step: int, tensors: Tensors) -> tuple[float, float]:
    """(seconds for which a step stood still: in `save` and before the optimizer, products a second in between)."""
    begin = time.perf_counter()
    checkpointer.save(step, {"model": tensors}, {"step": step})
    blocked = time.perf_counter() - begin
    speed = compute(0.5)
    begin = time.perf_counter()
    checkpointer.wait_staged()
    blocked += time.perf_counter() - begin
    finish(checkpointer)
    return blocked, speed


def durable_seconds(checkpointer: Checkpointer, step: int, tensors: Tensors) -> float:
    begin = time.perf_counter()
    checkpointer.save(step, {"model": tensors}, {"step": step}, wait=True)
    seconds = time.perf_counter() - begin
    finish(checkpointer)
    return seconds


def finish(checkpointer: Checkpointer) -> None:
    checkpointer.wait()
    (event,) = checkpointer.poll()
    assert isinstance(event, Saved), event


def write_and_sync(path: Path, tensors: Tensors) -> float:
    begin = time.perf_counter()
    save_file(tensors, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - begin


def part_seconds(folder: Path, step: int, tensors: Tensors) -> Times:
    """A rank's part of a save, from copies in memory to durable files, with checksums and without; no commit."""
    place = LocalPlace(folder)
    staged = {"model": {name: Piece.all_of(tensor) for name, tensor in tensors.items()}}
    header, order = encode_header(tensors)
    times = {}

    def unchecked() -> None:
        draft.write("model.safetensors", [header, *(tensor_bytes(tensors[name]) for name in order)])
        draft.write("state.json", [b"{}"])

    ways = {CHECKED: lambda: write_part(draft, 0, 1, staged, b"{}"), UNCHECKED: unchecked}
    for name, way in sorted(ways.items(), reverse=bool(step % 2)):  # neither is always the first on an idle disk
        draft = place.begin(step, "0a")
        begin = time.perf_counter()
        way()
        times[name] = time.perf_counter() - begin
        draft.abandon()
    return times


def dcp_save(path: Path, tensors: Tensors) -> float:
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says that there is one process only
        save_distributed(dict(tensors), checkpoint_id=path)
    return time.perf_counter() - begin


def load_seconds(run_dir: Path) -> float:
    begin = time.perf_counter()
    assert load_latest(run_dir) is not None
    return time.perf_counter() - begin


def one_round(folder: Path, step: int, tensors: Tensors, first: Checkpointer, overlapped: Checkpointer) -> Times:
    alone = compute(0.5)
    beside, speed = blocked_seconds(overlapped, 2 * step, tensors)
    times = {
        "burnish, copy beside the next step: step blocked": beside,
        "burnish, copy first: step blocked": blocked_seconds(first, 2 * step, tensors)[0],
        "burnish, wait=True (checksums and commit)": durable_seconds(first, 2 * step + 1, tensors),
        "burnish, load (checksums verified)": load_seconds(folder / "first"),
        SYNCHRONOUS: write_and_sync(folder / "reference.safetensors", tensors),
        "torch.distributed.checkpoint save": dcp_save(folder / "dcp", tensors),
        "0.5 s of matrix products: loss beside a background save": max(0.0, 0.5 * (1 - speed / alone)),
    }
    times |= part_seconds(folder / "first", 1000 + step, tensors)
    shutil.rmtree(folder / "dcp")
    (folder / "reference.safetensors").unlink()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; by default where temporary files go")
    arguments = parser.parse_args()
    # Matrices of 4 MiB and as many small vectors, as a model has them.
    tensors = {f"layer.{i}.weight": torch.randn(1024, 1024) for i in range(arguments.mib // 4)}
    tensors |= {f"layer.{i}.bias": torch.randn(1023) for i in range(arguments.mib // 4)}
    size = sum(tensor.nbytes for tensor in tensors.values())
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        checkpointers = []
        for run in ("first", "overlapped"):
            (folder / run).mkdir()
            checkpointers.append(Checkpointer(folder / run, keep=1))
        checkpointers[1].overlap(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]))
        rounds = [one_round(folder, step, tensors, *checkpointers) for step in range(arguments.rounds + 1)]
        for checkpointer in checkpointers:
            checkpointer.close()
    medians = {name: statistics.median(times[name] for times in rounds[1:]) for name in rounds[0]}
    medians |= {f"{name}, first save of a run": rounds[0][name] for name in list(medians)[:2]}
    added = statistics.median(times[CHECKED] / times[UNCHECKED] for times in rounds[1:]) - 1
    goals = {CHECKED: f"<= 5 % more than without: {added:+.1%}"}
    rows = [
        {
            "what": name,
            "MiB": size / 2**20,
            "seconds": seconds,
            "GB/s": size / seconds / 1e9 if seconds and "products" not in name else "",
            "share of a synchronous save": seconds / medians[SYNCHRONOUS],
            "goal": "<= 0.1 of it" if name.endswith("step blocked") else goals.get(name, ""),
        }
        for name, seconds in medians.items()
    ]
    report("checkpoint", rows)


if __name__ == "__main__":
    main()
