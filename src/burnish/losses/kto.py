"""Kahneman-Tversky optimisation: answers marked good or bad, one by one, without pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Gt

from burnish.losses.base import Loss
from burnish.losses.reduce import by_document
from burnish.types import LossOutput

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.types import Block, RowKind, TokenOutputs


class KTO(Loss):
    """w_d (1 - sigmoid(beta (r - z))) for a desirable answer and w_u (1 - sigmoid(beta (z - r))) for an undesirable
    one, with r = log p - log q of the answer under policy p and reference q, and z = max(0, KL(p || q)) as estimated
    over the step, a constant.

    Ethayarajh et al., arXiv:2402.01306, section 4. Where the policy equals the reference it is half the answer's
    weight: 0.5. `rewards/accuracies` is the share of answers on their side of z. Counted by answer; a column `weight`
    multiplies its answer and leaves the count as it is.
    """

    type: Literal["kto"] = "kto"
    asks: ClassVar[frozenset[str]] = frozenset({"ref_logprobs", "kto_kl"})
    rows: ClassVar[RowKind] = "unpaired"
    beta: Annotated[float, Gt(0)] = 0.1
    """How closely the policy is held to the reference; larger is closer."""
    desirable_weight: Annotated[float, Gt(0)] = 1.0
    """Of desirable answers. Of them and undesirable ones, number times weight should stand between 1 : 1 and 4 : 3."""
    undesirable_weight: Annotated[float, Gt(0)] = 1.0
    """Of undesirable answers."""

    def count(self, block: Block) -> Tensor:
        return (block.columns["preference"] != 0).sum()

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        assert outputs.logprobs is not None
        side_D, columns = block.columns["preference"].double().sign(), block.columns
        good_D, bad_D = side_D > 0, side_D < 0
        logp_D = by_document(outputs.logprobs * block.loss_mask, block)
        ratio_D = logp_D - by_document(columns["ref_logprobs"] * block.loss_mask, block)
        kl_D = columns["kto_kl"].detach().double()
        weight_D = self.desirable_weight * good_D + self.undesirable_weight * bad_D
        if "weight" in columns:
            weight_D = weight_D * columns["weight"]
        loss_D = 1 - (self.beta * side_D * (ratio_D - kl_D)).sigmoid()
        total, count = (loss_D * weight_D).sum(), self.count(block)

        reward_D, logp_D = self.beta * ratio_D.detach(), logp_D.detach()
        metrics = {
            "loss": (total.detach(), count),
            "kl": ((kl_D * (side_D != 0)).sum(), count),
            "rewards/chosen": ((reward_D * good_D).sum(), good_D.sum()),
            "rewards/rejected": ((reward_D * bad_D).sum(), bad_D.sum()),
            "rewards/accuracies": ((side_D * (ratio_D - kl_D) > 0).sum(), count),
            "logps/chosen": ((logp_D * good_D).sum(), good_D.sum()),
            "logps/rejected": ((logp_D * bad_D).sum(), bad_D.sum()),
        }
        return LossOutput(total, metrics)
