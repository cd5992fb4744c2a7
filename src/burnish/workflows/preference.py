"""Preference optimisation: from pairs of a better and a worse answer, or from answers marked good or bad."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import model_validator

from burnish.component import OneOf
from burnish.losses.base import Loss
from burnish.policy.second import Reference
from burnish.workflows.base import Workflow, minimise

if TYPE_CHECKING:
    from burnish.policy.second import SecondModel
    from burnish.workflows.run import Run

LOSSES = OneOf("burnish.losses", default="dpo")


class Preference(Workflow):
    """Makes chosen answers likelier than rejected ones, measured against a reference where the loss has one."""

    type: Literal["preference"] = "preference"
    loss: Annotated[Loss, LOSSES] = LOSSES.field(Loss)
    """What is minimised; `{type: sum, terms: [...]}` adds several."""
    reference: Reference = Reference()
    """What the policy is measured against, by losses that ask `ref_logprobs`."""

    @model_validator(mode="after")
    def _answered(self) -> Self:
        asked = self.loss.asks | self.loss.needs & {"full_kl"}
        unanswered = asked - self.reference.provides()
        if not asked and self.reference != Reference():
            raise ValueError(f"the loss {self.loss.type} has no reference: remove `reference`")
        if "kto_kl" in unanswered:
            raise ValueError(
                f"the loss {self.loss.type} asks about mismatched answers, which each step makes anew: use `reference: "
                f"{{precompute: false}}`"
            )
        if "full_kl" in unanswered:
            raise ValueError(
                f"the loss {self.loss.type} compares whole distributions, which are not kept: use `reference: "
                f"{{precompute: false}}`"
            )
        if unanswered:
            raise ValueError(
                f"the loss {self.loss.type} asks {', '.join(sorted(unanswered))}, which a reference does not say: use "
                f"`workflow: {{type: distill, teacher: {{path: ...}}}}`"
            )
        return self

    def losses(self) -> list[Loss]:
        return [self.loss]

    def second(self) -> SecondModel | None:
        return self.reference if self.loss.asks or self.loss.divergence is not None else None

    def run(self, run: Run) -> None:
        """Gradient descent on the loss, one global batch of pairs a step."""
        minimise(run, self.loss)
