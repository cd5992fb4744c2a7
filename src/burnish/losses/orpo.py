"""Odds-ratio preference optimisation: imitate the chosen answer, and shun the rejected one, in one stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Gt

from burnish.losses.pairs import PairLoss, Pairs

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.types import Block, LossOutput, TokenOutputs

SUREST = -1e-7
"""Largest mean log-probability that odds are taken of: at 0, which float32 rounds a memorised answer to, p / (1 - p)
and its gradient are infinite."""


class ORPO(PairLoss):
    """-log p_c - beta log sigmoid(log odds_c - log odds_r), with log p the mean log-probability of an answer's tokens,
    odds = p / (1 - p), and c and r a pair's chosen and rejected answers. Counted by pair.

    Hong et al., arXiv:2403.07691, eq. 3 to 7, where beta is lambda. As there, the first term is a mean over the
    answer's tokens and then over the pairs: a short answer weighs as much as a long one, and both terms have one count.
    """

    type: Literal["orpo"] = "orpo"
    asks: ClassVar[frozenset[str]] = frozenset()
    beta: Annotated[float, Gt(0)] = 0.1
    """Weight of the odds ratio beside the likelihood of the chosen answer."""

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        from torch.nn.functional import logsigmoid

        pairs = Pairs.of(outputs, block)
        chosen, rejected = pairs.logps(mean=True)
        log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)
        loss = -chosen - self.beta * logsigmoid(log_odds_ratio)
        rewards = self.beta * chosen, self.beta * rejected
        return pairs.output(loss, *rewards, nll_loss=-chosen, log_odds_ratio=log_odds_ratio)


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p))"""
    logp = logp.clamp(max=SUREST)
    return logp - (-logp.expm1()).log()
