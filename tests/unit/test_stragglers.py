"""Which rank holds the others up."""

from __future__ import annotations

import torch

from burnish.workflows.stragglers import Finding, Lookout, Stragglers, device_probe
from tests.rank_helpers import ThreadMesh, on_ranks

EVEN = [[0.01, 0.005]] * 4


def with_rank_2(rows: float, device: float) -> list[list[float]]:
    """A look at four ranks, of which one differs."""
    return [[rows, device] if rank == 2 else look for rank, look in enumerate(EVEN)]


def test_a_rank_is_named_with_its_cause_in_the_third_look_in_a_row_and_once() -> None:
    stragglers, slow = Stragglers(), with_rank_2(0.07, 0.020)
    found = [stragglers.judge(slow) for _ in range(5)]
    assert found == [[], [], [Finding(2, "its rows", 0.07, 0.01), Finding(2, "its device", 0.020, 0.005)], [], []]
    assert [str(finding) for finding in found[2]] == [
        "rank 2 waits for its rows: 0.07 s, the median is 0.01 s",
        "rank 2 is slow by its device: 0.02 s, the median is 0.005 s",
    ]


def test_a_good_look_between_begins_the_count_anew() -> None:
    stragglers, slow = Stragglers(), with_rank_2(0.01, 0.020)
    looks = [slow, slow, EVEN, slow, slow, slow, EVEN, slow, slow, slow]
    assert [len(stragglers.judge(look)) for look in looks] == [0, 0, 0, 0, 0, 1, 0, 0, 0, 1]


def test_half_as_much_again_is_not_slow_nor_is_what_nobody_notices() -> None:
    """1.5 * 0.005 + 0.002 = 0.0095 for the probe; 1.5 * 0.01 + 0.05 = 0.065 for the rows."""
    stragglers = Stragglers()
    assert not any(stragglers.judge(with_rank_2(0.064, 0.0094)) for _ in range(4))
    assert [finding.cause for _ in range(3) for finding in stragglers.judge(with_rank_2(0.066, 0.0096))] == [
        "its rows",
        "its device",
    ]


def test_of_two_ranks_the_slower_is_found_and_of_four_two() -> None:
    pair, four = Stragglers(), Stragglers()
    assert [f.rank for _ in range(3) for f in pair.judge([[0.0, 0.020], [0.0, 0.010]])] == [0]
    assert [f.rank for _ in range(3) for f in four.judge([[0, 0.1], [0, 0.01], [0, 0.1], [0, 0.01]])] == [0, 2]


def test_ranks_that_look_agree_on_who_is_slow() -> None:
    """Rank 1 waits 80 ms for its rows in each step, and its device takes six times as long."""

    def rank(mesh: ThreadMesh) -> list[Finding]:
        lookout = Lookout(mesh, lambda: 0.06 if mesh.rank else 0.01, every=2)
        return [finding for _ in range(6) for finding in lookout.after_step(0.08 * mesh.rank)]

    first, second = on_ranks(2, rank)
    assert first == second
    assert [(finding.rank, finding.cause) for finding in first] == [(1, "its rows"), (1, "its device")]


def test_a_device_takes_time() -> None:
    assert 0.0 < device_probe(torch.device("cpu"))() < 60.0


def test_a_rank_alone_is_never_slow() -> None:
    def refuse() -> float:
        raise AssertionError("nothing to compare with")

    (found,) = on_ranks(1, lambda mesh: [Lookout(mesh, refuse, every=1).after_step(9.0) for _ in range(4)])
    assert found == [[], [], [], []]
