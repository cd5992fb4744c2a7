"""How far an engine's log-probabilities may be from the policy's, and how far they are.

Two programs compute the probability of one token: the engine that drew it, by a cache and one token at a time, and the
policy that trains on it, over packed rows. Their difference must be rounding. A larger one is a fault that no loss
curve shows: an adapter that never arrived, a temperature that one side applies, a cache of older weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt

from burnish.component import Config

SAME_CODE_LIMITS = {"float32": 5e-5, "float16": 0.04, "bfloat16": 0.5}
"""Largest difference by precision, for an engine that runs the policy's own modules: twice what rounding alone does in
a trained model. SmolLM2-135M-Instruct on a CPU, some 270 tokens of the embedded engine (float16: 80 of transformers'
own cache) against the policy's forward pass:

    float32     1.8e-5, on average 3.0e-6
    float16     0.017,  on average 0.0039
    bfloat16    0.22,   on average 0.043

A random model of 4 layers, whose logits are about 1 and not 20, has 9.5e-7, 6.1e-4 and 4.0e-3."""
LIMITS = {dtype: 2 * limit for dtype, limit in SAME_CODE_LIMITS.items()}
"""For other engines, whose rounding is not the policy's: vLLM in float32 was within 6e-5 of transformers."""
MEAN_SHARE = 0.25
"""How much of it the mean difference may be; by rounding it is 0.16 to 0.23 of the largest. Where vLLM kept a stale
copy of a head, nearly every token was wrong by 0.3 to 0.5: in bfloat16 only the mean gives that away."""
LARGEST_LOG_RATIO = 80.0
"""exp(80) squared is still a float64."""


class Alignment(Config):
    """After a sync the engines continue a few prompts, and the policy says the log-probabilities of the same tokens."""

    every: Annotated[int, Ge(1)] = 10
    """Syncs between two probes, and steps between two measurements of all that is trained on; at the start and after a
    resume there is always one, and a probe also behind the first update."""
    num_prompts: Annotated[int, Ge(1)] = 2
    """Prompts of a probe; more workers are asked the same ones, so that each is asked."""
    num_tokens: Annotated[int, Ge(1)] = 8
    """Tokens sampled for each."""
    max_difference: Annotated[float, Gt(0)] | Literal["auto"] = "auto"
    """Largest difference of a log-probability, and four times the largest mean. `auto`: by the lower precision of the
    two, 1e-4 in float32, 0.08 in float16, 1.0 in bfloat16; half of that for an engine of the policy's own code."""
    action: Literal["refuse", "warn"] = "refuse"
    """What becomes of a larger one."""

    def limit(self, dtypes: Sequence[str], *, same_code: bool) -> float:
        """Largest difference that passes.

        Args:
            dtypes: of the weights that policy and engine compute with, as in `model.dtype`.
            same_code: the engine runs the policy's own modules.
        """
        if self.max_difference != "auto":
            return self.max_difference
        limits = SAME_CODE_LIMITS if same_code else LIMITS
        return max(limits[dtype] for dtype in dtypes)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Log-probabilities of tokens under the policy, log p, beside those of the engine that drew them, log q.

    The estimators of KL(q | p) from tokens drawn from q are Schulman's (joschu.net/blog/kl-approx.html), with the
    importance ratio r = p / q: k1 the mean of -log r, k3 the mean of r - 1 - log r, which is never negative.
    """

    num_tokens: int
    num_not_finite: int
    """Tokens of which a side says no finite number; the rest is over the others."""
    mean_difference: float
    """Of |log p - log q|."""
    max_difference: float
    k1: float
    k3: float
    ratio_q01: float
    """1 % of the tokens have a smaller ratio."""
    ratio_q50: float
    ratio_q99: float
    effective_share: float
    """Effective sample size over tokens, (sum r)^2 / (n sum r^2): 1 where all ratios are equal."""
    policy_perplexity: float
    rollout_perplexity: float
    likelier_in_engine: float
    """Share of the tokens with log q > log p."""

    def as_metrics(self) -> dict[str, float]:
        """By field."""
        return {name: float(value) for name, value in asdict(self).items()}


def measure(policy_logprobs: Sequence[float] | np.ndarray, rollout_logprobs: Sequence[float] | np.ndarray) -> Mismatch:
    """Of the same tokens, one number each: sampled ones only, of all ranks where there are several.

    >>> measure([-1.0, -2.0], [-1.0, -2.1]).mean_difference
    0.05
    """
    p, q = np.asarray(policy_logprobs, np.float64), np.asarray(rollout_logprobs, np.float64)
    assert p.shape == q.shape and p.ndim == 1, f"{p.shape} and {q.shape} are not of the same tokens"
    finite = np.isfinite(p) & np.isfinite(q)
    lost = int(np.sum(~finite))
    p, q = p[finite], q[finite]
    if not len(p):
        nothing = math.nan
        return Mismatch(lost, lost, *[nothing] * 11)
    log_ratio = np.clip(p - q, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    ratio = np.exp(log_ratio)
    low, middle, high = np.quantile(ratio, (0.01, 0.5, 0.99))
    return Mismatch(
        num_tokens=len(p) + lost,
        num_not_finite=lost,
        mean_difference=float(np.abs(p - q).mean()),
        max_difference=float(np.abs(p - q).max()),
        k1=float((q - p).mean()),
        k3=float((np.expm1(log_ratio) - log_ratio).mean()),
        ratio_q01=float(low),
        ratio_q50=float(middle),
        ratio_q99=float(high),
        effective_share=float(ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum())),
        policy_perplexity=float(np.exp(np.minimum(-p.mean(), LARGEST_LOG_RATIO))),
        rollout_perplexity=float(np.exp(np.minimum(-q.mean(), LARGEST_LOG_RATIO))),
        likelier_in_engine=float((q > p).mean()),
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an engine computes what the policy does."""

    aligned: bool
    words: str
    """What was found, and where to look if it is too much."""


def judge(found: Mismatch, limit: float) -> Verdict:
    """Of a probe right after a sync, when engine and policy hold the same weights.

    Args:
        limit: see `Alignment.limit`.
    """
    aligned = (
        0 == found.num_not_finite < found.num_tokens
        and found.max_difference <= limit
        and found.mean_difference <= MEAN_SHARE * limit
    )
    said = (
        f"log-probabilities of engine and policy differ by up to {found.max_difference:.2g} over {found.num_tokens} "
        f"tokens, {found.mean_difference:.2g} on average; {limit:.2g} and {MEAN_SHARE * limit:.2g} are allowed"
    )
    return Verdict(aligned, said if aligned else f"{said}: {_suspect(found)}")


def _suspect(found: Mismatch) -> str:
    if not found.num_tokens:
        return "the engine sampled nothing"
    if found.num_not_finite:
        return (
            f"{found.num_not_finite} tokens have no finite log-probability on a side: weights that are not finite, or "
            "a token that one side cannot draw (top_k, top_p, another vocabulary)"
        )
    if found.num_tokens >= 8 and not 0.1 < found.likelier_in_engine < 0.9:
        more = "likelier" if found.likelier_in_engine >= 0.9 else "less likely"
        return (
            f"nearly every token is {more} in the engine: one side does not apply the temperature, or the engine's "
            "are not of the distribution that it drew from (top_k, top_p)"
        )
    if found.mean_difference < found.max_difference / 8:
        return (
            "a few tokens stand out: precision (attention or head in a lower one, an expert chosen by a hair), or rows "
            "that a cache kept from older weights"
        )
    return (
        "most tokens differ, to both sides: the engine holds other weights (compare the receipts' digests; was an "
        "adapter applied, the prefix cache emptied?), or another architecture's option (soft cap, sliding window)"
    )
