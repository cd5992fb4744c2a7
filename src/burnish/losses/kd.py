"""Distillation of a teacher's whole distribution, token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Gt, Interval

from burnish.losses.base import Loss
from burnish.losses.reduce import trained_weight
from burnish.types import Divergence, LossOutput

if TYPE_CHECKING:
    from burnish.types import Block, TokenOutputs


class KD(Loss):
    """temperature^2 * D(p, q) over the whole vocabulary, summed over the trained tokens and counted by token, with p
    the student's and q the teacher's softmax(logits / temperature).

    Hinton et al., arXiv:1503.02531, section 2: gradients of soft targets shrink as 1 / temperature^2, so the factor
    keeps the weight of this loss beside others, such as `nll` in a sum, as the temperature is moved. `divergence` is
    measured without it, in nats. Who wrote the tokens, a person, the teacher or the student itself, is not asked.
    """

    type: Literal["kd"] = "kd"
    needs: ClassVar[frozenset[str]] = frozenset({"full_kl"})
    kind: Literal["forward", "reverse", "jsd"] = "forward"
    """`forward`: KL(q || p), which covers all that the teacher might say; `reverse`: KL(p || q), which keeps to what it
    most likely says; `jsd`: between the two, by `beta`."""
    beta: Annotated[float, Interval(gt=0, lt=1)] = 0.5
    """With `jsd` only: the teacher's weight in the mixture. As beta goes to 0 the divergence goes to beta times the
    forward KL, as it goes to 1 to 1 - beta times the reverse (Agarwal et al., arXiv:2306.13649, eq. 1)."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Of both distributions; above 1 the unlikely tokens count for more."""

    @property
    def divergence(self) -> Divergence:
        return Divergence(self.kind, self.beta, self.temperature)

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        assert outputs.full_kl is not None
        total, count = (outputs.full_kl * trained_weight(block)).sum(), self.count(block)
        loss = self.temperature**2 * total
        return LossOutput(loss, {"loss": (loss.detach(), count), "divergence": (total.detach(), count)})
