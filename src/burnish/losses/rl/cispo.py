"""Clipped importance weights: every token keeps its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from annotated_types import Ge, Gt
from pydantic import model_validator

from burnish.component import unfit
from burnish.losses.rl.base import PolicyLoss, Sampled, Term

if TYPE_CHECKING:
    from burnish.types import Block


class CISPO(PolicyLoss):
    """-sg(clip(rho, min_ratio, max_ratio)) A log pi, with rho = pi / pi_old of each token and no gradient through sg.

    MiniMax-M1, arXiv:2506.13585, eq. 4 and 5, whose 1 - eps_low is `min_ratio` and 1 + eps_high is `max_ratio`. Where
    clipping the surrogate drops the gradient of rare tokens that begin a new thought, this bounds their weight.
    """

    type: Literal["cispo"] = "cispo"
    min_ratio: Annotated[float, Ge(0)] = 0.0
    """Smallest weight, the bound itself: 0 is none."""
    max_ratio: Annotated[float, Gt(0)] = 5.0
    """Largest weight, the bound itself and not its distance from 1 (5: Khatri et al., arXiv:2510.13786)."""

    @model_validator(mode="after")
    def _around_one(self) -> Self:
        if self.max_ratio <= 1:
            reason = f"{self.max_ratio:g} would shrink tokens whose probability has not moved"
            cure = f"it is the largest ratio itself: an eps_high of {self.max_ratio:g} is {1 + self.max_ratio:g} here"
            raise unfit(reason, cure, "max_ratio")
        if self.min_ratio >= 1:
            reason = f"{self.min_ratio:g} would raise tokens whose probability has not moved"
            raise unfit(reason, "it is the smallest ratio itself: an eps_low of 0.2 is 0.8 here", "min_ratio")
        return self

    def surrogate(self, sampled: Sampled, block: Block) -> Term:
        ratio = sampled.ratio.detach()
        weights = ratio.clamp(self.min_ratio, self.max_ratio)
        metrics = {
            "ratio": ratio,
            "clip_fraction_low": ratio < self.min_ratio,
            "clip_fraction_high": ratio > self.max_ratio,
        }
        return Term(-weights * sampled.advantages * sampled.logprobs, metrics)
