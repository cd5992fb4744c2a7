"""A weighted sum of losses: preferences and imitation, a divergence and the data's likelihood, several tasks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal, Self

from annotated_types import Ge, MinLen
from pydantic import model_validator

from burnish.component import Config, OneOf
from burnish.losses.base import Loss
from burnish.types import LossOutput

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.types import Block, Divergence, Ranking, RowKind, TokenOutputs

SINGLE = ("full_kl", "candidate_logits", "ranks")
"""Outputs that the model makes for one loss only: against one divergence, of one list of candidates."""


class Term(Config):
    """One of the losses, and its weight."""

    weight: Annotated[float, Ge(0)] = 1.0
    """Multiplies the loss, after it was divided by its own count."""
    loss: Annotated[Loss, OneOf("burnish.losses", without=("sum",))]
    """Any loss but a sum: the terms of a sum of sums are those of one."""


class Sum(Loss):
    """weight_1 mean_1 + weight_2 mean_2 + ..., each mean over what its own loss counts: pairs, tokens, documents.

    The total is [n] and the count [n], one entry a term (two for `cpo`, which has two). A step's `loss` is
    the sum itself; the terms' own, without their weights, are `dpo/loss` and `nll/loss`.

    `{type: sum, terms: [{loss: {type: dpo}}, {weight: 0.2, loss: {type: nll}}]}` is DPO held in place by the likelihood
    of the chosen answers (RPO; Pang et al., arXiv:2404.19733, eq. 1, with the mean over all tokens of the step).
    """

    type: Literal["sum"] = "sum"
    terms: Annotated[list[Term], MinLen(1)]
    """What is added up."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        kinds = sorted({loss.rows for loss in self.singles()} - {"conversation"})
        if len(kinds) > 1:
            raise ValueError(f"its terms read rows of different kinds, {' and '.join(kinds)}: train them one by one")
        for loss in self.singles():
            if not loss.trains:
                raise ValueError(f"{loss.type} measures a model and has no gradient: name it in `evaluate`")
        for name in SINGLE:
            takers = [loss.type for loss in self.singles() if name in loss.needs]
            if len(takers) > 1:
                raise ValueError(
                    f"{' and '.join(takers)} both need {name}, which is made for one: train them one by one"
                )
        for loss in self.singles():
            for head, form in loss.heads().items():
                if form != (other := self.heads()[head]):
                    raise ValueError(
                        f"{loss.type} reads the head '{head}' as `{form}`, another term as `{other}`: give each a head "
                        "of its own by `head:`"
                    )
        return self

    def singles(self) -> list[Loss]:
        return [term.loss for term in self.terms]

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`logprobs` stands for `weighted_nll`, which the projection makes for one loss only."""
        needs = frozenset[str]().union(*(loss.needs for loss in self.singles()))
        return needs - {"weighted_nll"} | {"logprobs"} if "weighted_nll" in needs else needs

    @property
    def asks(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return frozenset[str]().union(*(loss.asks for loss in self.singles()))

    @property
    def rows(self) -> RowKind:  # pyright: ignore[reportIncompatibleVariableOverride]
        kinds: list[RowKind] = [loss.rows for loss in self.singles() if loss.rows != "conversation"]
        return kinds[0] if kinds else "conversation"

    @property
    def divergence(self) -> Divergence | None:
        return next((loss.divergence for loss in self.singles() if loss.divergence is not None), None)

    def heads(self) -> dict[str, Literal["number", "numbers", "classes"]]:
        return {name: says for loss in self.singles() for name, says in loss.heads().items()}

    def labels(self) -> dict[str, str]:
        """Of a column that several heads learn, the last: the recipe is refused where they disagree on its classes."""
        return {column: head for loss in self.singles() for column, head in loss.labels().items()}

    def reads(self, block: Block) -> Tensor:
        import torch

        return torch.stack([loss.reads(block) for loss in self.singles()]).any(0)

    def candidates(self, block: Block) -> Tensor:
        return next(loss.candidates(block) for loss in self.singles() if "candidate_logits" in loss.needs)

    def ranking(self, block: Block) -> Ranking:
        return next(loss.ranking(block) for loss in self.singles() if "ranks" in loss.needs)

    def count(self, block: Block) -> Tensor:
        import torch

        return torch.cat([loss.count(block).reshape(-1) for loss in self.singles()])

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        import torch

        totals, metrics = [], []
        for term in self.terms:
            said = term.loss(_as_needed(term.loss, outputs, block), block)
            totals.append(term.weight * said.total.reshape(-1))
            metrics.append(said.metrics)
        return LossOutput(torch.cat(totals), self._named(metrics))

    def _named(self, metrics: list[dict]) -> dict:
        """All metrics; `loss`, and what several terms name, have the term's type before them: `dpo`, `dpo_2`, `nll`."""
        times = Counter(name for own in metrics for name in own)
        seen, named = Counter(), {}
        for loss, own in zip(self.singles(), metrics, strict=True):
            kind = loss.type.rpartition(":")[2]
            seen[kind] += 1
            prefix = kind if seen[kind] == 1 else f"{kind}_{seen[kind]}"
            for name, pair in own.items():
                named[f"{prefix}/{name}" if name == "loss" or times[name] > 1 else name] = pair
        return named


def _as_needed(loss: Loss, outputs: TokenOutputs, block: Block) -> TokenOutputs:
    if "weighted_nll" not in loss.needs:
        return outputs
    assert outputs.logprobs is not None
    return replace(outputs, weighted_nll=-(loss.coefficients(block) * outputs.logprobs).sum())
