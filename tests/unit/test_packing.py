"""Packers by hand, and what must hold for any lengths."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from burnish.data.packing.base import Packing, max_documents
from burnish.data.packing.best_fit import BestFit, BestFitPacker, best_fit_decreasing, merge_rows
from burnish.data.packing.none import NoPacking
from burnish.errors import DataError


def test_each_group_goes_into_the_tightest_row_and_the_fullest_row_closes() -> None:
    packer = BestFitPacker(row_length=10, open_bins=2)
    assert packer.add(6) == (0, None)  # rooms: 0: 4
    assert packer.add(7) == (1, None)  # rooms: 1: 3, 0: 4
    assert packer.add(3) == (1, 1)  # exactly full
    assert packer.add(5) == (2, None)  # rooms: 0: 4, 2: 5
    assert packer.add(8) == (3, 3)  # three would be open; the new one is the fullest of them
    assert packer.add(6) == (4, 0)  # rooms 0: 4, 4: 4, 2: 5; of two equally full rows the older closes
    assert packer.add(4) == (4, 4)
    assert packer.add(10) == (5, 5)  # a whole row closes nothing else
    assert packer.add(5) == (2, 2)


def test_a_row_closes_at_its_last_document() -> None:
    packer = BestFitPacker(row_length=64, open_bins=4)  # 64 // 8 = 8 documents
    assert [packer.add(2) for _ in range(9)] == [(0, None)] * 7 + [(0, 0), (1, None)]
    assert packer.add(2, documents=6) == (1, None)
    assert packer.add(2, documents=2) == (2, None), "row 1 has 60 tokens of room, but only for one document"
    assert packer.add(2) == (1, 1), "the tighter of 60 and 62 tokens of room; its eighth document"


@pytest.mark.parametrize("seed", range(6))
def test_packing_loses_and_splits_nothing(seed: int) -> None:
    rng = random.Random(seed)
    row_length, open_bins = rng.choice([(64, 1), (64, 4), (200, 16)])
    packer = BestFitPacker(row_length, open_bins)
    rows: dict[int, list[int]] = {}
    closed: list[int] = []
    lengths = [rng.randint(1, row_length) if rng.random() < 0.3 else rng.randint(1, 20) for _ in range(2000)]
    for index, length in enumerate(lengths):
        number, done = packer.add(length)
        assert number not in closed
        rows.setdefault(number, []).append(index)
        if done is not None:
            closed.append(done)
        assert len(rows) - len(closed) <= open_bins
    assert sorted(index for row in rows.values() for index in row) == list(range(2000))
    assert all(sum(lengths[i] for i in row) <= row_length for row in rows.values())
    assert all(len(row) <= max_documents(row_length) for row in rows.values())
    assert len(set(closed)) == len(closed)


def closed_rows(packer: BestFitPacker, rows: dict[int, list[int]], lengths: list[int]) -> list[list[int]]:
    closed = []
    for length in lengths:
        number, done = packer.add(length)
        rows.setdefault(number, []).append(length)
        if done is not None:
            closed.append(rows.pop(done))
    return closed


def test_a_packer_opened_with_bins_goes_on_as_the_one_that_filled_them() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(1, 60) for _ in range(600)]
    packer, rows = BestFitPacker(100, 5), {}
    closed_rows(packer, rows, lengths[:300])
    again = BestFit(open_bins=5).open(100, [(sum(row), len(row)) for row in rows.values()])
    copies = {number: list(row) for number, row in enumerate(rows.values())}
    expected = closed_rows(packer, rows, lengths[300:])
    assert len(expected) > 50
    assert closed_rows(again, copies, lengths[300:]) == expected


def test_no_packing_gives_every_group_its_row() -> None:
    packer = NoPacking().open(10)
    assert [packer.add(length) for length in (3, 4, 10)] == [(0, 0), (1, 1), (2, 2)]


def test_offline_best_fit_takes_the_longest_first() -> None:
    # 7 opens row A, 5 row B, 4 fits B (5 left) tightest of {A: 3, B: 5}, then 3 fills A, 1 fills B
    assert best_fit_decreasing([(3, 1), (7, 1), (4, 1), (1, 1), (5, 1)], 10) == [[0, 1], [2, 3, 4]]
    assert best_fit_decreasing([], 10) == []


def test_only_the_emptier_open_rows_are_merged() -> None:
    rows = [[(62, 1)], [(20, 1), (30, 1)], [(63, 1)], [(10, 1), (4, 1)]]
    # 62 and 63 of 64 tokens are full enough; 30 + 20 + 10 + 4 are one more row
    assert merge_rows(rows, 64) == [[0], [3], [1, 2, 4, 5]]


def fill(lengths: list[int], lanes: int, open_bins: int, row_length: int) -> float:
    rows, left = 0, []
    for lane in range(lanes):
        packer, bins = BestFitPacker(row_length, open_bins), {}
        for length in lengths[lane::lanes]:
            number, done = packer.add(length)
            bins.setdefault(number, []).append((length, 1))
            if done is not None:
                rows += 1
                del bins[done]
        left += bins.values()
    rows += len(merge_rows(left, row_length))
    return sum(lengths) / (rows * row_length)


def test_fill_over_every_row() -> None:
    normal = np.random.default_rng(0).normal(5.7, 1.0, 6000)
    lengths = np.exp(normal).astype(int).clip(8, 4096).tolist()
    fills = [fill(lengths, 8, open_bins, 4096) for open_bins in (1, 4, 16, 64)]
    assert all(a < b for a, b in pairwise(fills[:3]))
    assert fills[2] >= 0.995 and fills[3] >= 0.995


def test_rows_must_hold_the_longest_document() -> None:
    assert Packing(type="x").tokens_per_row(512) == 512
    assert BestFit(row_length=1024).tokens_per_row(512) == 1024
    with pytest.raises(DataError, match="rows of 256 tokens cannot hold a document of max_length 512") as refused:
        BestFit(row_length=256).tokens_per_row(512)
    assert refused.value.where == "data.packing.row_length"
