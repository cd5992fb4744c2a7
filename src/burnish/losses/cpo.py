"""Contrastive preference optimisation: DPO without a reference, held in place by the likelihood of chosen answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt

from burnish.losses.pairs import PairLoss, Pairs, pair_metrics, split
from burnish.losses.reduce import by_document
from burnish.types import LossOutput

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.types import Block, TokenOutputs


class CPO(PairLoss):
    """-log sigmoid(beta (log p_c - log p_r)), a mean over pairs, and -cpo_alpha log p_c, a mean over the tokens of all
    chosen answers, with p_c and p_r the probabilities of a pair's chosen and rejected answers.

    Xu et al., arXiv:2401.08417, section 3. The paper writes the second term as a sum over an answer's tokens; the
    authors' code, and the ecosystem's, takes the mean over the tokens of a batch, as here. So the total is [2], counted
    by pairs and by tokens: neither mean depends on how the batch is packed or split.
    """

    type: Literal["cpo"] = "cpo"
    asks: ClassVar[frozenset[str]] = frozenset()
    beta: Annotated[float, Gt(0)] = 0.1
    """Scale of the log-probabilities."""
    cpo_alpha: Annotated[float, Ge(0)] = 1.0
    """Weight of the likelihood of the chosen answers."""

    def count(self, block: Block) -> Tensor:
        import torch

        chosen_tokens, _ = split(by_document(block.loss_mask, block), block)
        return torch.stack([super().count(block), chosen_tokens.sum()])

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        import torch
        from torch.nn.functional import logsigmoid

        pairs = Pairs.of(outputs, block)
        chosen, rejected = pairs.logps(mean=False)
        preference = (-logsigmoid(self.beta * (chosen - rejected)) * pairs.weight).sum()
        nll = (-chosen * pairs.weight).sum()
        metrics = {
            "preference_loss": (preference.detach(), pairs.is_pair.sum()),
            "nll_loss": (nll.detach(), pairs.chosen_tokens.sum()),
            **pair_metrics(pairs, self.beta * chosen, self.beta * rejected),
        }
        return LossOutput(torch.stack([preference, self.cpo_alpha * nll]), metrics)
