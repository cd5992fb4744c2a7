"""The clipped surrogate, token by token: GRPO, DAPO and their kin."""

from __future__ import annotations

from typing import Literal

from burnish.losses.rl.clipping import ClippedLoss


class PPOClip(ClippedLoss):
    """max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)) with rho = pi / pi_old of each token.

    Schulman et al., arXiv:1707.06347, eq. 7, without a value function. What makes it GRPO, DAPO or Dr.GRPO are the
    advantage, `aggregation` and the two bounds: `workflow.preset`.
    """

    type: Literal["ppo_clip"] = "ppo_clip"
