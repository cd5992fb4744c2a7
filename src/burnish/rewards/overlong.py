"""Soft overlong punishment: completions are taught to end before they are cut off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge
from pydantic import model_validator

from burnish.rewards.base import LiveReward, Reward
from burnish.rewards.completions import values_of


class Overlong(Reward):
    """0 up to `max_tokens - buffer_tokens` sampled tokens, then falling in a straight line to -1 at `max_tokens` and
    beyond. Yu et al., DAPO, arXiv:2503.14476, eq. 13."""

    type: Literal["overlong"] = "overlong"
    max_tokens: Annotated[int, Ge(1)]
    """Usually `rollout.sampling.max_new_tokens`."""
    buffer_tokens: Annotated[int, Ge(1)]
    """Length of the slope; the paper has 4096 of 20480."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.buffer_tokens > self.max_tokens:
            raise ValueError(f"buffer_tokens {self.buffer_tokens} is longer than max_tokens {self.max_tokens}")
        return self

    def open(self) -> LiveReward:
        return self._scores

    def _scores(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[float]:
        lengths = [len(token_ids) for token_ids in values_of(columns, "completion_ids")]
        over = [length - (self.max_tokens - self.buffer_tokens) for length in lengths]
        return [0.0 - min(max(each, 0) / self.buffer_tokens, 1.0) for each in over]
