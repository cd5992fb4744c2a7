"""What measures and judges how far an engine's log-probabilities are from the policy's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from burnish.errors import SyncFailed
from burnish.rollout.alignment import Alignment, judge, measure
from burnish.rollouts import Prompt, SamplingParams
from burnish.workflows.rollout_probe import Probe


def test_of_four_tokens_by_hand():
    """Ratios 2, 1, 1/2 and 1 of tokens that the engine drew at 1/4, 1/2, 1/2 and 1/8."""
    policy = np.log([1 / 2, 1 / 2, 1 / 4, 1 / 8])
    rollout = np.log([1 / 4, 1 / 2, 1 / 2, 1 / 8])
    found = measure(policy, rollout)
    assert (found.num_tokens, found.num_not_finite) == (4, 0)
    assert found.mean_difference == pytest.approx(2 * math.log(2) / 4)
    assert found.max_difference == pytest.approx(math.log(2))
    assert found.k1 == pytest.approx(0.0, abs=1e-15)  # -log 2 and log 2 cancel
    # r - 1 - log r: 1 - log 2, 0, -1/2 + log 2, 0
    assert found.k3 == pytest.approx((1 - math.log(2) - 0.5 + math.log(2)) / 4)
    assert found.ratio_q50 == pytest.approx(1.0)
    # Sorted 0.5, 1, 1, 2: 1 % lies 0.03 of the way from the first to the second, 99 % as far from the last.
    assert found.ratio_q01 == pytest.approx(0.5 + 0.03 * 0.5)
    assert found.ratio_q99 == pytest.approx(2 - 0.03 * 1)
    assert found.effective_share == pytest.approx(4.5**2 / (4 * (4 + 1 + 0.25 + 1)))
    assert found.policy_perplexity == pytest.approx((2 * 2 * 4 * 8) ** (1 / 4))
    assert found.rollout_perplexity == pytest.approx((4 * 2 * 2 * 8) ** (1 / 4))
    assert found.likelier_in_engine == 0.25


def test_equal_ones_have_the_ratio_one_exactly():
    found = measure([-0.5, -3.25, -11.0], [-0.5, -3.25, -11.0])
    assert (found.max_difference, found.k1, found.k3, found.effective_share) == (0.0, 0.0, 0.0, 1.0)
    assert (found.ratio_q01, found.ratio_q50, found.ratio_q99) == (1.0, 1.0, 1.0)


def test_a_small_difference_survives_the_k3_estimator():
    """d^2 / 2 for small d; `exp(d) - 1 - d` as it is written down would be 0 or rounding noise of 1e-16."""
    assert measure([-1.0 + 1e-6], [-1.0]).k3 == pytest.approx(5e-13, rel=1e-4)


def test_what_no_side_can_draw_is_counted_and_overflows_nothing():
    found = measure([-1.0, -math.inf, math.nan, -1.0], [-1.0, -2.0, -1.0, -2000.0])
    assert (found.num_tokens, found.num_not_finite) == (4, 2)
    assert found.max_difference == 1999.0 and math.isfinite(found.k3) and math.isfinite(found.effective_share)
    verdict = judge(found, limit=1e4)
    assert not verdict.aligned and "2 tokens have no finite log-probability" in verdict.words


def test_without_tokens_nothing_is_aligned():
    assert math.isnan(measure([], []).mean_difference)
    assert not judge(measure([], []), 1.0).aligned
    assert not judge(measure([math.nan], [-1.0]), 1.0).aligned


def test_the_limit_follows_the_lower_precision():
    auto = Alignment()
    assert auto.limit(["float32", "float32"], same_code=False) == 1e-4
    assert auto.limit(["float32", "float32"], same_code=True) == 5e-5
    assert auto.limit(["float32", "bfloat16"], same_code=False) == 1.0
    assert auto.limit(["float16", "float32"], same_code=True) == 0.04
    assert Alignment(max_difference=0.25).limit(["bfloat16", "float32"], same_code=True) == 0.25


TOKENS = np.linspace(-0.1, -6.0, 16)
SIGNS = np.tile([1.0, -1.0], 8)


@pytest.mark.parametrize(
    ("rollout", "suspected"),
    [
        pytest.param(
            TOKENS / 0.7, "less likely in the engine: one side does not apply the temperature", id="temperature"
        ),
        pytest.param(TOKENS + 0.2, "likelier in the engine", id="top_p"),
        pytest.param(TOKENS + 0.2 * SIGNS, "the engine holds other weights", id="weights"),
        pytest.param(
            TOKENS + np.where(np.arange(16) == 5, 0.2, 0.0001 * SIGNS), "a few tokens stand out", id="outlier"
        ),
    ],
)
def test_the_words_say_where_to_look(rollout, suspected):
    verdict = judge(measure(TOKENS, rollout), 1e-3)
    assert not verdict.aligned and suspected in verdict.words


def test_a_difference_at_the_limit_passes():
    near = [-1.0, -2.0, -3.0, -4.0]
    assert judge(measure(near, [-1.25, *near[1:]]), 0.25).aligned
    assert not judge(measure(near, [-1.25, *near[1:]]), 0.2499).aligned


def test_a_small_difference_of_all_tokens_is_too_much():
    """What a stale head does in bfloat16: 0.4 everywhere, where rounding reaches 1.0 at one token in a hundred."""
    assert not judge(measure(TOKENS, TOKENS + 0.4 * SIGNS), 1.0).aligned
    assert judge(measure(TOKENS, TOKENS + np.where(np.arange(16) == 5, 0.9, 0.04 * SIGNS)), 1.0).aligned


@dataclass
class Asked:
    """A run's rollouts as far as a probe goes: a fleet of `num_workers`, whose engines draw `said` for each prompt."""

    num_workers: int
    said: list[float]
    version: int = 0
    probes: list[list[Prompt]] = field(default_factory=list)

    def sample(self, prompts: Any, params: SamplingParams, size: int, kind: str) -> list[Prompt]:
        self.probes.append(prompts(self))
        return self.probes[-1]

    @property
    def fleet(self) -> Asked:
        return self

    def probe_prompts(self, count: int) -> list[Prompt]:
        return [Prompt(place, "", [10 + place], None) for place in range(count)]

    def packed(self, groups: list[Prompt]) -> Any:
        self.blocks = self.said * len(groups)
        return self

    @property
    def policy(self) -> Asked:
        return self

    def logprobs(self, blocks: list[float], *, trained_only: bool) -> list[float]:
        return blocks

    def read(self, column: list[float]) -> torch.Tensor:
        return torch.tensor(column)

    def read_column(self, name: str) -> torch.Tensor:
        return torch.tensor(self.blocks)


def probe_of(**alignment: Any) -> Probe:
    return Probe(Alignment(**alignment), 1e-3, SamplingParams(max_new_tokens=4), lambda *_, **__: None)


def test_a_probe_comes_at_the_start_behind_the_first_update_and_every_so_often():
    rollouts: Any = Asked(1, [-1.0])
    probe, counts = probe_of(every=3), list[int]()
    for version in range(8):
        probe.after_sync(rollouts, first=version == 0)
        counts.append(len(rollouts.probes))
    assert counts == [1, 2, 2, 3, 3, 3, 4, 4]
    probe.after_sync(rollouts, first=True)  # after a resume
    probe.after_sync(rollouts, first=False)
    assert len(rollouts.probes) == 6


@pytest.mark.parametrize(("num_workers", "asked"), [(1, [10, 11]), (5, [10, 11, 10, 11, 10])])
def test_a_probe_has_a_prompt_for_every_worker(num_workers: int, asked: list[int]):
    rollouts: Any = Asked(num_workers, [-1.0])
    probe_of(num_prompts=2).after_sync(rollouts, first=True)
    (prompts,) = rollouts.probes
    assert [prompt.token_ids for prompt in prompts] == [[token] for token in asked]
    assert [prompt.index for prompt in prompts] == list(range(len(asked)))  # by which they are named and seeded


def test_an_engine_that_samples_nothing_is_not_aligned():
    rollouts: Any = Asked(1, [])
    probe = probe_of()
    with pytest.raises(SyncFailed, match="after the sync of policy 0, .* the engine sampled nothing"):
        probe.after_sync(rollouts, first=True)
    assert probe.last is None
