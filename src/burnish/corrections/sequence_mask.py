"""Importance sampling of the rollouts on which policy and engine nearly agree; the others are masked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Gt, Interval

from burnish.corrections.base import Corrected, Correction

if TYPE_CHECKING:
    from torch import Tensor


class SequenceMask(Correction):
    """w = prod_t rho_t for all tokens of a rollout where min_ratio <= w <= max_ratio, else 0, with
    rho_t = pi_old(t) / mu(t). The default of TRL's `vllm_importance_sampling_mode`.
    """

    type: Literal["sequence_mask"] = "sequence_mask"
    of: ClassVar[Literal["token", "sequence", "sequence_mean"]] = "sequence"
    min_ratio: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Smallest ratio of a rollout that is kept."""
    max_ratio: Annotated[float, Gt(1)] = 3.0
    """Largest."""

    def __call__(self, log_ratio: Tensor) -> Corrected:
        ratio = log_ratio.exp()
        outside = (ratio < self.min_ratio) | (ratio > self.max_ratio)
        return Corrected(ratio.masked_fill(outside, 0.0), outside)
