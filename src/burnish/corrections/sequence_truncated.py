"""Truncated importance sampling, rollout by rollout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge

from burnish.corrections.base import Corrected, Correction

if TYPE_CHECKING:
    from torch import Tensor


class SequenceTruncated(Correction):
    """min(prod_t rho_t, max_weight) for all tokens of a rollout, with rho_t = pi_old(t) / mu(t).

    Before it is truncated this is the weight of importance sampling over whole sequences, without bias; it spreads
    exponentially with the length, so it is for short rollouts.
    """

    type: Literal["sequence_truncated"] = "sequence_truncated"
    of: ClassVar[Literal["token", "sequence", "sequence_mean"]] = "sequence"
    max_weight: Annotated[float, Ge(1)] = 5.0
    """Largest weight of a rollout."""

    def __call__(self, log_ratio: Tensor) -> Corrected:
        ratio = log_ratio.exp()
        return Corrected(ratio.clamp(max=self.max_weight), ratio > self.max_weight)
