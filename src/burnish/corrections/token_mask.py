"""Importance sampling of the tokens on which policy and engine nearly agree; the others are masked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt, Interval

from burnish.corrections.base import Corrected, Correction

if TYPE_CHECKING:
    from torch import Tensor


class TokenMask(Correction):
    """rho_t where min_ratio <= rho_t <= max_ratio, else 0, with rho_t = pi_old(t) / mu(t) (IcePop: Ling team, "Every
    step evolves", arXiv:2510.18855).

    A token that the engine made far likelier or rarer than the policy has a gradient that is mostly noise.
    """

    type: Literal["token_mask"] = "token_mask"
    min_ratio: Annotated[float, Interval(ge=0, lt=1)] = 0.5
    """Smallest ratio of a token that is kept."""
    max_ratio: Annotated[float, Gt(1)] = 5.0
    """Largest."""

    def __call__(self, log_ratio: Tensor) -> Corrected:
        ratio = log_ratio.exp()
        outside = (ratio < self.min_ratio) | (ratio > self.max_ratio)
        return Corrected(ratio.masked_fill(outside, 0.0), outside)
