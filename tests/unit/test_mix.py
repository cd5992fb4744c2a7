"""The order of samples: exact shares, true permutations."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest

from burnish.data.mix import CHUNK, Mixer, permutation_keys, permute


def test_three_to_one() -> None:
    mixer = Mixer([3.0, 1.0])
    assert [mixer.at(index) for index in range(8)] == [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (0, 4), (1, 1), (0, 5)]


def test_equal_weights_take_turns_in_the_order_of_the_recipe() -> None:
    mixer = Mixer([0.1, 0.1, 0.1])
    assert [mixer.at(index)[0] for index in range(6)] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    "weights",
    [
        [1.0],
        [0.7, 0.3],
        [1.0, 0.1, 0.01],
        [0.3741, 1.0, 1.0, 9.2, 0.5],
        [50.0, *[1.0] * 11],
        [float(n) ** 1.5 for n in range(1, 13)],
    ],
)
def test_every_prefix_has_its_exact_shares_to_less_than_one_sample(weights: list[float]) -> None:
    mixer, given = Mixer(weights), [0] * len(weights)
    shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    for index in range(2 * CHUNK + 100):
        source, ordinal = mixer.at(index)
        assert ordinal == given[source]
        given[source] += 1
        owed = [abs(share * (index + 1) - count) for share, count in zip(shares, given, strict=True)]
        assert max(owed) < 1


def test_a_mixer_starts_anywhere_from_an_index_and_its_counts() -> None:
    weights = [5.0, 2.0, 0.9]
    whole = Mixer(weights)
    order = [(whole.at(index), whole.counts) for index in range(3 * CHUNK)]
    for start in (0, 5, CHUNK - 1, CHUNK, 2 * CHUNK + 17):
        part = Mixer(weights, start, order[start][1])
        for index in range(start, 3 * CHUNK, 8):
            assert part.at(index) == order[index][0]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 10, 37, 64, 65, 1000])
def test_each_epoch_is_a_permutation(size: int) -> None:
    for epoch in range(3):
        keys = permutation_keys(0, 0, epoch)
        assert sorted(permute(index, size, keys) for index in range(size)) == list(range(size))


def test_all_orders_of_four_rows_come_up_about_equally() -> None:
    orders = Counter(tuple(permute(i, 4, permutation_keys(seed, 0, 0)) for i in range(4)) for seed in range(4800))
    assert len(orders) == 24
    assert min(orders.values()) >= 140 and max(orders.values()) <= 260  # 200 expected, standard deviation 14


def test_every_row_is_equally_likely_at_every_place_and_neighbours_part() -> None:
    seeds, size = 3000, 12
    places: Counter[tuple[int, int]] = Counter()
    adjacent = 0
    for seed in range(seeds):
        order = [permute(index, size, permutation_keys(seed, 1, 2)) for index in range(size)]
        places.update(enumerate(order))
        adjacent += sum(b == a + 1 for a, b in pairwise(order))
    assert len(places) == size * size
    assert min(places.values()) >= 170 and max(places.values()) <= 330  # 250 expected, standard deviation 15
    assert 0.82 < adjacent / seeds < 1.02  # (size - 1) / size = 0.917 in a random order


def test_permutations_are_the_same_everywhere() -> None:
    """Written down once: a change of these numbers would reorder every run that is resumed."""
    assert [permute(index, 10, permutation_keys(0, 0, 0)) for index in range(10)] == [2, 4, 6, 1, 8, 3, 0, 9, 7, 5]
