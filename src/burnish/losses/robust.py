"""Robust DPO: unbiased where a known share of the pairs is labelled the wrong way round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt, Interval

from burnish.losses.pairs import PairLoss, Pairs

if TYPE_CHECKING:
    from torch import Tensor


class Robust(PairLoss):
    """(-(1 - e) log sigmoid(m) + e log sigmoid(-m)) / (1 - 2 e), with m as in DPO and e the label smoothing.

    Chowdhury et al., arXiv:2403.00409, section 3: where labels are flipped with probability e, the expected loss is the
    DPO loss of the true labels, (1 - e) L(m) + e L(-m) = -log sigmoid(m). It can be negative. Where the policy equals
    the reference it is ln 2 = 0.6931. Counted by pair.
    """

    type: Literal["robust"] = "robust"
    beta: Annotated[float, Gt(0)] = 0.1
    """How closely the policy is held to the reference; larger is closer."""
    label_smoothing: Annotated[float, Interval(ge=0, lt=0.5)] = 0.1
    """Share of pairs that are labelled the wrong way round; 0 is DPO."""

    def compare(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        from torch.nn.functional import logsigmoid

        chosen, rejected = pairs.ratios(mean=False)
        margin, flipped = self.beta * (chosen - rejected), self.label_smoothing
        loss = (flipped * logsigmoid(-margin) - (1 - flipped) * logsigmoid(margin)) / (1 - 2 * flipped)
        return loss, self.beta * chosen, self.beta * rejected
