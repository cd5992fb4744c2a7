"""Simple preference optimisation: tokens of chosen answers are likelier than those of rejected ones; no reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt

from burnish.losses.pairs import PairLoss, Pairs

if TYPE_CHECKING:
    from torch import Tensor


class SimPO(PairLoss):
    """-log sigmoid(beta log p_c / |c| - beta log p_r / |r| - gamma), with p_c and p_r the probabilities of a pair's
    chosen and rejected answers of |c| and |r| tokens. Counted by pair.

    Meng et al., arXiv:2405.14734, eq. 6. Nothing holds the model to where it began: watch `logps/chosen`.
    """

    type: Literal["simpo"] = "simpo"
    asks: ClassVar[frozenset[str]] = frozenset()
    beta: Annotated[float, Gt(0)] = 2.0
    """Scale of the mean log-probability of a token; 2 to 10 is usual."""
    gamma: Annotated[float, Ge(0)] = 0.5
    """By how much beta times the mean log-probabilities shall differ; 0.3 to 1.6 with a beta of 2."""

    def compare(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        from torch.nn.functional import logsigmoid

        chosen, rejected = pairs.logps(mean=True)
        loss = -logsigmoid(self.beta * (chosen - rejected) - self.gamma)
        return loss, self.beta * chosen, self.beta * rejected
