"""What a correction is: weights for tokens that were not drawn from the policy whose gradient they are to give.

An engine computes the probabilities it draws from with kernels, a precision and weights of its own, so a token comes
from mu and not from the policy pi_old that the loss's ratio starts from. A correction looks at log(pi_old / mu), which
has no gradient, and says how much each token counts. It must not know blocks or losses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from burnish.component import Component

if TYPE_CHECKING:
    from torch import Tensor


class Corrected(NamedTuple):
    """One entry for each entry of the log-ratio."""

    weights: Tensor
    """What the policy's loss is multiplied with."""
    changed: Tensor
    """bool: truncated, or masked; logged as a share."""


class Correction(Component):
    """Chosen by `loss.correction: {type: ...}`. The loss's denominator is counted before: what is masked stays in it,
    so that the tokens which are kept are not blown up."""

    of: ClassVar[Literal["token", "sequence", "sequence_mean"]] = "token"
    """Of what it is given log(pi_old / mu): each token [T]; the sum over each rollout's sampled tokens [D]; or their
    mean [D]. Its weights are then those of tokens, or of whole rollouts."""

    def __call__(self, log_ratio: Tensor) -> Corrected:
        """`log_ratio` is clamped to +-20."""
        raise AssertionError(f"{type(self).__name__} is not callable")
