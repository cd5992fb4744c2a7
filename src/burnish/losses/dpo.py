"""Direct preference optimisation: the chosen answer gains on the rejected one, relative to a reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt, Interval

from burnish.losses.pairs import PairLoss, Pairs

if TYPE_CHECKING:
    from torch import Tensor


class DPO(PairLoss):
    """-(1 - e) log sigmoid(m) - e log sigmoid(-m), with m = beta ((log p_c - log q_c) - (log p_r - log q_r)) of a
    pair's chosen and rejected answers under policy p and reference q, and e the label smoothing.

    Rafailov et al., arXiv:2305.18290, eq. 7; smoothing: Mitchell, "A note on DPO with noisy preferences & relationship
    to IPO", 2023; length-normalised: Lambert et al. (Tulu 3), arXiv:2411.15124. Where the policy equals the reference
    it is ln 2 = 0.6931. Counted by pair; a column `weight` multiplies its pair and leaves the count as it is, here and
    in all losses on pairs.
    """

    type: Literal["dpo"] = "dpo"
    beta: Annotated[float, Gt(0)] = 0.1
    """How closely the policy is held to the reference; larger is closer. Length-normalised, 2 to 10 is usual."""
    label_smoothing: Annotated[float, Interval(ge=0, lt=0.5)] = 0.0
    """Share of pairs that are taken to be labelled the wrong way round."""
    length_normalised: bool = False
    """Compare the mean log-ratio of an answer's tokens instead of their sum, so that long answers are not favoured."""

    def compare(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        from torch.nn.functional import logsigmoid

        chosen, rejected = pairs.ratios(mean=self.length_normalised)
        margin = self.beta * (chosen - rejected)
        loss = -(1 - self.label_smoothing) * logsigmoid(margin) - self.label_smoothing * logsigmoid(-margin)
        return loss, self.beta * chosen, self.beta * rejected
