"""Proximal policy optimisation with a value head on the policy's own body."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Gt

from burnish.losses.rl.base import Sampled, Term
from burnish.losses.rl.clipping import ClippedLoss
from burnish.types import previous_token

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.types import Block, Metric, TokenOutputs


class PPO(ClippedLoss):
    """max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)) + value_coef / 2 max((V - R)^2, (V_c - R)^2), with V what
    the head says before the token was drawn, R the column `returns`, and V_c = V_old + clip(V - V_old, -value_clip,
    value_clip) from the column `old_values`.

    Schulman et al., arXiv:1707.06347, eq. 7 and 9. The model has both heads: `model.head: {type: multi, heads: {lm:
    {type: lm}, value: {type: scalar}}}`, and `workflow.advantage: {type: gae}` makes the returns. Both terms are
    averaged as `aggregation` says.
    """

    type: Literal["ppo"] = "ppo"
    needs: ClassVar[frozenset[str]] = frozenset({"logprobs", "entropy", "scores"})
    value_coef: Annotated[float, Gt(0)] = 0.5
    """Weight of the value head's error beside the policy's loss."""
    value_clip: Annotated[float, Gt(0)] | None = 0.2
    """How far from `old_values` a value may gain by moving; absent: as far as it likes."""
    head: str = "value"
    """Which of the model's heads says the value."""

    def heads(self) -> dict[str, Literal["number", "numbers", "classes"]]:
        return {self.head: "number"}

    def reads(self, block: Block) -> Tensor:
        return block.loss_mask | value_reads(block)

    def values(self, outputs: TokenOutputs, block: Block) -> Tensor:
        before_T = previous_token(block)
        values = outputs.scores[self.head].squeeze(1)[before_T.clamp(min=0)]
        return values.where(block.loss_mask & (before_T >= 0), 0.0)

    def further(self, outputs: TokenOutputs, sampled: Sampled, block: Block) -> Term:
        values, returns = self.values(outputs, block), block.columns["returns"]
        error = values - returns
        squared = error**2
        metrics = {
            "values": values,
            "returns": returns,
            "returns_squared": returns.double() ** 2,
            "value_error": error,
            "value_error_squared": error.double() ** 2,
        }
        if self.value_clip is not None:
            old = block.columns["old_values"]
            moved = values - old
            clipped = ((old + moved.clamp(-self.value_clip, self.value_clip)) - returns) ** 2
            metrics["value_clip_fraction"] = (moved.abs() > self.value_clip) & (clipped > squared)
            squared = squared.maximum(clipped)
        metrics["value_loss"] = squared / 2
        return Term(self.value_coef / 2 * squared, metrics)


def value_reads(block: Block) -> Tensor:
    """bool [T]: the tokens at which a value head must be read to know the value before each sampled token."""
    import torch

    before_n = previous_token(block)[block.loss_mask]
    marks = torch.zeros(block.num_tokens + 1, dtype=torch.bool, device=before_n.device)
    return marks.index_fill(0, torch.where(before_n >= 0, before_n, block.num_tokens), True)[:-1]


def explained_variance(metrics: Mapping[str, Metric]) -> float:
    """1 - Var(R - V) / Var(R) over a step's sampled tokens, from the metrics of `PPO`: 1 is a perfect value head, 0 one
    that knows no more than the mean. 0 where all returns are equal."""

    def mean(name: str) -> float:
        total, count = metrics[name]
        return total / (count or 1.0)

    of_returns = mean("returns_squared") - mean("returns") ** 2
    of_errors = mean("value_error_squared") - mean("value_error") ** 2
    return 1 - of_errors / of_returns if of_returns > 0 else 0.0
