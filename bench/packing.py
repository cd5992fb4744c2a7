"""Packing alone: how full the rows are, every one counted, and how fast a row is found.

    python -m bench.packing

Lengths are log-normal with a mean of about 480 tokens, capped at the row length of 4,096, as in chat data.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np

from bench.report import report
from burnish.data.packing.best_fit import BestFitPacker, best_fit_decreasing, merge_rows

ROW_LENGTH = 4096
LANES = 8


def main() -> None:
    rows = []
    for count in (50_000, 3_000):
        sizes = [(length, 1) for length in lengths(count)]
        total = sum(length for length, _ in sizes)
        rows += [streamed(sizes, open_bins) for open_bins in (4, 16, 64)]
        offline = len(best_fit_decreasing(sizes, ROW_LENGTH))
        rows.append(result(count, "all known", total, offline))
    report("packing", rows)


def lengths(count: int) -> list[int]:
    """Tokens of each document."""
    drawn = np.exp(np.random.default_rng(0).normal(5.7, 1.0, count))
    return drawn.astype(int).clip(8, ROW_LENGTH).tolist()


def streamed(sizes: list[tuple[int, int]], open_bins: int) -> dict[str, Any]:
    """Eight lanes as in a run of `num_epochs`; the last open rows of all lanes are merged."""
    total = sum(length for length, _ in sizes)
    lanes = [[length for length, _ in sizes[lane::LANES]] for lane in range(LANES)]
    best = min(packer_seconds(lanes, open_bins) for _ in range(3))
    closed, left = 0, []
    for lane in range(LANES):
        packer = BestFitPacker(ROW_LENGTH, open_bins)
        bins: dict[int, list[tuple[int, int]]] = {}
        for size in sizes[lane::LANES]:
            number, done = packer.add(*size)
            bins.setdefault(number, []).append(size)
            if done is not None:
                closed += 1
                del bins[done]
        left += bins.values()
    goal = "fill >= 0.995, >= 100 Mtok/s" if open_bins >= 16 and len(sizes) == 50_000 else ""
    found = result(len(sizes), str(open_bins), total, closed + len(merge_rows(left, ROW_LENGTH)))
    return found | {"packer_mtok_per_second": total / best / 1e6, "goal": goal}


def packer_seconds(lanes: list[list[int]], open_bins: int) -> float:
    """Time to place every document, on one core."""
    started = perf_counter()
    for lane in lanes:
        add = BestFitPacker(ROW_LENGTH, open_bins).add
        for length in lane:
            add(length)
    return perf_counter() - started


def result(count: int, open_bins: str, total: int, rows: int) -> dict[str, Any]:
    return {
        "documents": count,
        "mean_tokens": total / count,
        "open_bins": open_bins,
        "rows": rows,
        "fill": total / (rows * ROW_LENGTH),
    }


if __name__ == "__main__":
    main()
