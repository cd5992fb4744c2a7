"""Rollouts on which policy and engine disagree on average are masked; the others count as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Gt, Interval

from burnish.corrections.base import Corrected, Correction

if TYPE_CHECKING:
    from torch import Tensor


class GeometricMask(Correction):
    """1 where min_ratio <= (prod_t rho_t)^(1 / n) <= max_ratio, else 0, for all n sampled tokens of a rollout, with
    rho_t = pi_old(t) / mu(t).

    A mean, so that the bounds mean the same for rollouts of any length: 0.99 to 1.01 is one percent a token.
    """

    type: Literal["geometric_mask"] = "geometric_mask"
    of: ClassVar[Literal["token", "sequence", "sequence_mean"]] = "sequence_mean"
    min_ratio: Annotated[float, Interval(ge=0, lt=1)] = 0.99
    """Smallest mean ratio of a rollout that is kept."""
    max_ratio: Annotated[float, Gt(1)] = 1.01
    """Largest."""

    def __call__(self, log_ratio: Tensor) -> Corrected:
        ratio = log_ratio.exp()
        outside = (ratio < self.min_ratio) | (ratio > self.max_ratio)
        return Corrected((~outside).to(ratio.dtype), outside)
