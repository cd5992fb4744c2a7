"""Drawing from hand-made logits, and how slots are put together."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from burnish.errors import RunFailed
from burnish.rollout.decode_cache import Feed, runs
from burnish.rollout.decode_draw import draw, uniform
from burnish.rollout.decode_engine import common_beginning
from burnish.rollouts import SamplingParams

# 1/2, 1/4, 1/8, 1/8: summed 0.5, 0.75, 0.875, 1
HALVES = [math.log(p) for p in (0.5, 0.25, 0.125, 0.125)]


def drawn(number: float, logits: list[float] = HALVES, **params: float) -> tuple[int, float]:
    sampling = SamplingParams.model_validate(params)
    tokens, logprobs = draw(torch.tensor([logits]), [sampling], [number])
    return tokens[0], math.exp(logprobs[0])


@pytest.mark.parametrize(
    ("number", "token", "probability"),
    [(0.0, 0, 0.5), (0.49, 0, 0.5), (0.51, 1, 0.25), (0.76, 2, 0.125), (0.99, 3, 0.125)],
)
def test_the_number_falls_into_a_tokens_share(number: float, token: int, probability: float) -> None:
    assert drawn(number) == (token, pytest.approx(probability, rel=1e-6))


@pytest.mark.parametrize(
    ("params", "probabilities"),
    [
        ({"temperature": 0.5}, [16 / 22, 4 / 22, 1 / 22, 1 / 22]),  # squares: 1/4, 1/16, 1/64, 1/64
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 3}, [4 / 7, 2 / 7, 1 / 7, 0]),  # of two equal ones the smaller id stays
        ({"top_k": 9}, [0.5, 0.25, 0.125, 0.125]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_p": 0.51}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.1}, [1, 0, 0, 0]),
        ({"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),  # of what top_k leaves, the first holds 2/3
        ({"temperature": 0.5, "top_p": 0.8}, [0.8, 0.2, 0, 0]),  # cut after the temperature
    ],
)
def test_log_probabilities_are_of_the_distribution_drawn_from(
    params: dict[str, float], probabilities: list[float]
) -> None:
    numbers = [(i + 0.5) / 1000 for i in range(1000)]
    sampling = [SamplingParams.model_validate(params)] * 1000
    tokens, logprobs = draw(torch.tensor([HALVES]).repeat(1000, 1), sampling, numbers)
    counts = Counter(tokens)
    for token, probability in enumerate(probabilities):
        assert counts[token] == pytest.approx(1000 * probability, abs=1)
    for token, logprob in zip(tokens, logprobs, strict=True):
        assert math.exp(logprob) == pytest.approx(probabilities[token], rel=1e-5)


def test_temperature_zero_is_the_likeliest_and_its_untempered_probability() -> None:
    assert drawn(0.99, temperature=0.0, top_k=1, top_p=0.1) == (0, pytest.approx(0.5, rel=1e-6))


def test_rows_do_not_mix() -> None:
    params = [SamplingParams(), SamplingParams(top_k=1), SamplingParams(temperature=0.0)]
    tokens, logprobs = draw(torch.tensor([HALVES] * 3), params, [0.6, 0.6, 0.6])
    assert tokens == [1, 0, 0]
    assert [math.exp(value) for value in logprobs] == pytest.approx([0.25, 1.0, 0.5], rel=1e-6)


def test_the_largest_number_draws_a_token_that_can_be_drawn() -> None:
    logits = [0.0, *[-5.0] * 50_000, -math.inf]
    token, probability = drawn(1 - 2**-24, logits)
    assert token < 50_001 and probability > 0


def test_logits_that_are_no_numbers_fail_the_run() -> None:
    with pytest.raises(RunFailed, match="not finite"):
        drawn(0.5, [0.0, math.nan])


def test_numbers_are_even_over_seeds_and_places() -> None:
    numbers = [uniform(seed, index) for seed in range(100) for index in range(100)]
    assert len(set(numbers)) > 9_990  # of 2^24: three pairs are expected by chance
    assert all(0 <= number < 1 for number in numbers)
    counts = Counter(int(number * 16) for number in numbers)
    chi_squared = sum((counts[cell] - 625) ** 2 / 625 for cell in range(16))
    assert chi_squared < 37.7  # 15 degrees of freedom: beyond it once in a thousand
    later = [uniform(seed, index + 1) for seed in range(100) for index in range(100)]
    others = [uniform(seed + 1, index) for seed in range(100) for index in range(100)]
    for other in (later, others):
        together = torch.corrcoef(torch.tensor([numbers, other]))[0, 1].item()
        assert abs(together) < 0.035  # 3.5 standard errors


def test_the_streams_constants_are_splitmix64s() -> None:
    """Its published numbers from state 1234567 on are 6457827717110365317, 3203168211198807973, ...; ours begins with
    the mixed seed, so the seed that mixes to 1234567 is looked up here by undoing the mix."""
    mask = (1 << 64) - 1

    def unshift(z: int, by: int) -> int:
        found = z
        for _ in range(64 // by + 1):
            found = z ^ (found >> by)
        return found

    z = unshift(1234567, 31)
    z = unshift(z * pow(0x94D049BB133111EB, -1, 1 << 64) & mask, 27)
    seed = unshift(z * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & mask, 30)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [uniform(seed, i) for i in range(4)] == [(number >> 40) / 2**24 for number in expected]


def test_slots_attend_together_unless_padding_costs_more() -> None:
    def lengths(*feeds: tuple[int, int]) -> list[tuple[int, list[int]]]:
        return [(run.first, run.lengths) for run in runs([Feed(slot, length - 1, [0]) for slot, length in feeds])]

    assert lengths((0, 10), (1, 8), (2, 200)) == [(0, [10, 8, 200])]  # 600 keys, or 220 and a call for 400
    assert lengths((0, 10), (1, 8), (2, 5000)) == [(0, [10, 8]), (2, [5000])]
    assert lengths((0, 10), (2, 10), (3, 10)) == [(0, [10]), (2, [10, 10])]  # nobody is in slot 1
    assert [run.rows for run in runs([Feed(0, 1, [0]), Feed(2, 1, [0]), Feed(3, 1, [0])])] == [slice(0, 1), slice(1, 3)]


@pytest.mark.parametrize("common", [0, 31, 32, 33, 500])
def test_beginnings_that_are_worth_copying(common: int) -> None:
    one, other = [1] * 600, [1] * common + [2] * 100
    assert common_beginning(one, other) == common_beginning(other, one) == (common if common >= 32 else 0)
    assert common_beginning(one, one[:40]) == 40
