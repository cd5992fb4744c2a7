"""Identity preference optimisation: the chosen answer gains on the rejected one by a fixed distance, and no more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt

from burnish.losses.pairs import PairLoss, Pairs

if TYPE_CHECKING:
    from torch import Tensor


class IPO(PairLoss):
    """(h - 1 / (2 beta))^2, with h = (log p_c - log q_c) / |c| - (log p_r - log q_r) / |r| of a pair's chosen and
    rejected answers of |c| and |r| tokens under policy p and reference q. Counted by pair.

    Azar et al., arXiv:2310.12036, eq. 17, where beta is tau. The paper writes the sums over the tokens; its results,
    and the ecosystem's implementations, are of the means. Where the policy equals the reference it is 1 / (4 beta^2),
    25 at the default.
    """

    type: Literal["ipo"] = "ipo"
    beta: Annotated[float, Gt(0)] = 0.1
    """How closely the policy is held to the reference; the answers end up 1 / (2 beta) nats (a token) apart."""
    length_normalised: bool = True
    """Means over an answer's tokens; false: the sums of the paper's equation."""

    def compare(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected = pairs.ratios(mean=self.length_normalised)
        loss = (chosen - rejected - 1 / (2 * self.beta)).square()
        return loss, self.beta * chosen, self.beta * rejected
