"""Truncated importance sampling, token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge

from burnish.corrections.base import Corrected, Correction

if TYPE_CHECKING:
    from torch import Tensor


class TokenTruncated(Correction):
    """min(rho_t, max_weight), with rho_t = pi_old(t) / mu(t): a token that the engine drew too rarely counts for more,
    up to a bound.

    Ionides, "Truncated importance sampling", 2008; for engines of other numerics: Yao et al., "Your efficient RL
    framework secretly brings you off-policy RL training", 2025. Its bias is small, and no token is lost.
    """

    type: Literal["token_truncated"] = "token_truncated"
    max_weight: Annotated[float, Ge(1)] = 2.0
    """Largest weight of a token."""

    def __call__(self, log_ratio: Tensor) -> Corrected:
        ratio = log_ratio.exp()
        return Corrected(ratio.clamp(max=self.max_weight), ratio > self.max_weight)
