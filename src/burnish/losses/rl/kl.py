"""Estimates of a divergence from one sampled token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to it, e^20 = 4.9e8: beyond, float32 overflows before anything could be clipped."""


def kl_estimate(log_ratio: Tensor, estimator: Estimator) -> Tensor:
    """KL(p || q) as one token drawn from p tells it, with r = log p - log q the `log_ratio`; of the same shape.

    `k1`: r, without bias, of either sign; `k2`: r^2 / 2, of small bias and spread, whose gradient is that of the KL;
    `k3`: e^-r - 1 + r, without bias and never negative (Schulman, "Approximating KL divergence", 2020).
    """
    r = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        return r
    return r**2 / 2 if estimator == "k2" else (-r).exp() - 1 + r
