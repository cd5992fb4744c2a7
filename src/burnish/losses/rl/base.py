"""What losses on sampled tokens share: ratios, corrections, KL, entropy, how tokens are averaged, and metrics.

Vectors are [T] and 0 at tokens that were not sampled: prompts, what an environment said, padding. Must not know any one
loss, nor how advantages were made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from annotated_types import Ge, Gt
from pydantic import model_validator

from burnish.component import OneOf, unfit
from burnish.corrections.base import Correction
from burnish.losses.base import Loss
from burnish.losses.reduce import by_document, to_tokens
from burnish.losses.rl.kl import MAX_LOG_RATIO, Estimator, kl_estimate
from burnish.types import LossOutput

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.types import Block, RowKind, TokenOutputs

Metrics = dict[str, "tuple[Tensor, Tensor]"]


@dataclass(slots=True, frozen=True)
class Sampled:
    """The sampled tokens of a block under the policies that have a say, [T] each.

    `logprobs` is differentiable, and so are `log_ratio` and `ratio`; the others are constants.
    """

    mask: Tensor
    """bool: drawn by the policy."""
    advantages: Tensor
    logprobs: Tensor
    """log p of each under the policy that is trained, pi."""
    old: Tensor
    """Under the policy that the ratio is against, pi_old."""
    rollout: Tensor
    """Under the engine that drew it, mu."""
    log_ratio: Tensor
    """log pi - log pi_old, clamped to +-20."""

    @property
    def ratio(self) -> Tensor:
        """pi / pi_old of each token."""
        return self.log_ratio.exp()


@dataclass(slots=True, frozen=True)
class Term:
    """Something that is minimised at every sampled token."""

    loss: Tensor
    """[T], differentiable."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """name -> [T]; logged as means over sampled tokens."""


class PolicyLoss(Loss):
    """w_t surrogate_t + kl_coef KL_t - entropy_coef H_t, summed over sampled tokens and averaged as `aggregation` says.

    A loss says its `surrogate`, with w_t the weight that `correction` gives (1 without one). Columns of the block, [T]:
    `advantages`; `rollout_logprobs`; `old_logprobs` where an earlier pass wrote it; `ref_logprobs` with a `kl_coef`.
    Denominators are counted over the whole step, before any correction. Documents without sampled tokens count nothing.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logprobs", "entropy"})
    rows: ClassVar[RowKind] = "rollout"
    aggregation: Literal["token", "sequence", "constant"] = "token"
    """`token`: the mean over all sampled tokens of a step (DAPO), so long rollouts weigh more; `sequence`: the mean
    over rollouts of each one's mean (GRPO); `constant`: the mean over rollouts of each one's sum, divided by
    `constant_length` (Dr.GRPO), which favours no length."""
    constant_length: Annotated[float, Gt(0)] | None = None
    """With `constant` only: what every rollout's sum is divided by. Usually `rollout.sampling.max_new_tokens`; 1 for
    the plain sum, the log-probability of the whole rollout."""
    old_logprobs: Literal["policy", "rollout"] = "policy"
    """Which policy the ratio is against: the trained one, as it was before the first update on these rollouts (the
    ratio is exactly 1 in that update), or the engine's, as it drew them."""
    correction: Annotated[Correction, OneOf("burnish.corrections")] | None = None
    """Weights for what the engine drew with other probabilities than the old policy's; absent: all are 1."""
    kl_coef: Annotated[float, Ge(0)] = 0.0
    """How closely the policy is held to the reference; 0: not at all, and there is none."""
    kl_estimator: Estimator = "k3"
    """Of the divergence at a sampled token: k1, k2 or k3. The gradient of k2 is that of the KL, k3's is near it while
    the policies are, k1's averages to nothing."""
    kl_unbiased: bool = False
    """Multiply the estimate, k1 or k3, by the ratio: its gradient is then that of the KL, also where the rollouts are
    an older policy's (DeepSeek-V3.2, arXiv:2512.02556)."""
    entropy_coef: Annotated[float, Ge(0)] = 0.0
    """Reward for a nat of entropy at each sampled token."""

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if (self.constant_length is None) == (self.aggregation == "constant"):
            cure = "give both, usually with rollout.sampling.max_new_tokens, or neither"
            raise unfit("it is what `aggregation: constant` divides by", cure, "constant_length")
        if self.correction is not None and self.old_logprobs == "rollout":
            reason = (
                "it weighs the old policy against the rollout's, and with `old_logprobs: rollout` they are one and the "
                "same"
            )
            raise unfit(reason, "remove one of the two", "correction")
        if self.kl_coef and self.kl_estimator == "k1" and not self.kl_unbiased:
            cure = "k2 or k3, or `kl_unbiased: true`; or take k1 off the reward by `workflow.kl_penalty`"
            raise unfit("the gradient of k1 averages to zero, so it would hold nothing", cure, "kl_estimator")
        if self.kl_unbiased and self.kl_estimator == "k2":
            raise unfit("k2 is biased, with the ratio or without", "k1 or k3 with `kl_unbiased`", "kl_estimator")
        return self

    @property
    def asks(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return frozenset({"ref_logprobs"} if self.kl_coef else ())

    def surrogate(self, sampled: Sampled, block: Block) -> Term:
        """What makes tokens of positive advantage likelier, where the gradient allows it."""
        raise AssertionError(f"{type(self).__name__} must say its surrogate")

    def values(self, outputs: TokenOutputs, block: Block) -> Tensor:
        """[T]: what a value head says before each sampled token is drawn, 0 at the others; differentiable. `outputs`
        are what the loss `needs` where it `reads`."""
        raise AssertionError(f"{type(self).__name__} has no value head")

    def further(self, outputs: TokenOutputs, sampled: Sampled, block: Block) -> Term | None:
        """A term beside the policy's, averaged in the same way; no correction weighs it."""
        return None

    def count(self, block: Block) -> Tensor:
        if self.aggregation == "token":
            return block.loss_mask.sum()
        return (by_document(block.loss_mask, block) > 0).sum()

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        assert outputs.entropy is not None
        sampled = self._sampled(outputs, block)
        mask, count = sampled.mask, self.count(block)
        weights, metrics = self._weights(sampled, block)
        surrogate = self.surrogate(sampled, block)
        policy_loss = self._total(surrogate.loss * weights, block)
        means = {"entropy": outputs.entropy, "advantage_abs": sampled.advantages.abs()}
        means |= surrogate.metrics | _differences(sampled)

        total = policy_loss
        if self.kl_coef:
            log_ratio = sampled.logprobs - block.columns["ref_logprobs"]
            kl = kl_estimate(log_ratio, self.kl_estimator)
            means["ref_kl"] = kl
            total = total + self.kl_coef * self._total(kl * sampled.ratio if self.kl_unbiased else kl, block)
        if self.entropy_coef:
            total = total - self.entropy_coef * self._total(outputs.entropy, block)
        further = self.further(outputs, sampled, block)
        if further is not None:
            means |= further.metrics
            total = total + self._total(further.loss, block)

        tokens = mask.sum()
        metrics |= {name: (values.detach().double().where(mask, 0.0).sum(), tokens) for name, values in means.items()}
        return LossOutput(
            total, {"loss": (total.detach(), count), "policy_loss": (policy_loss.detach(), count), **metrics}
        )

    def _sampled(self, outputs: TokenOutputs, block: Block) -> Sampled:
        assert outputs.logprobs is not None
        columns, mask = block.columns, block.loss_mask
        logprobs = outputs.logprobs.where(mask, 0.0)
        rollout = columns["rollout_logprobs"].where(mask, 0.0)
        own = columns.get("old_logprobs", logprobs).detach().where(mask, 0.0)
        old = rollout if self.old_logprobs == "rollout" else own
        log_ratio = (logprobs - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return Sampled(mask, columns["advantages"].where(mask, 0.0), logprobs, old, rollout, log_ratio)

    def _weights(self, sampled: Sampled, block: Block) -> tuple[Tensor, Metrics]:
        """([T], metrics) of the correction, if there is one."""
        mask = sampled.mask
        if self.correction is None:
            return mask.to(sampled.old.dtype), {}
        log_ratio, counted = sampled.old - sampled.rollout, mask
        if self.correction.of != "token":
            tokens = by_document(mask, block)
            log_ratio, counted = by_document(log_ratio, block), tokens > 0
            if self.correction.of == "sequence_mean":
                log_ratio = log_ratio / tokens.clamp(min=1)
        weights, changed = self.correction(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
        number = counted.sum()
        metrics = {
            "correction_share": ((changed & counted).sum(), number),
            "correction_weight": ((weights * counted).sum(), number),
        }
        return weights if self.correction.of == "token" else to_tokens(weights, block), metrics

    def _total(self, loss: Tensor, block: Block) -> Tensor:
        """float64: the sum over a block of a [T] vector, which `count` over the whole step makes the aggregate."""
        sums = by_document(loss.where(block.loss_mask, 0.0), block)
        if self.aggregation == "sequence":
            sums = sums / by_document(block.loss_mask, block).clamp(min=1)
        return sums.sum() / (self.constant_length or 1.0)


def _differences(sampled: Sampled) -> dict[str, Tensor]:
    """How far the policies are from each other at each token.

    `approx_kl`: KL(pi_old || pi), k3. `mismatch_...`: how far the engine is from the old policy, or from the trained
    one where the ratio is against the engine: KL(mu || .) by k1 and k3, and the difference of log-probabilities.
    """
    against_engine = sampled.old is sampled.rollout
    mismatch = sampled.rollout - (sampled.logprobs.detach() if against_engine else sampled.old)
    return {
        "approx_kl": kl_estimate(-sampled.log_ratio.detach(), "k3"),
        "mismatch_kl": kl_estimate(mismatch, "k1"),
        "mismatch_k3": kl_estimate(mismatch, "k3"),
        "mismatch_abs": mismatch.abs(),
    }
