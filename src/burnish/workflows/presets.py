"""Published algorithms as the blocks that they are made of.

A preset is plain data: what stands in a recipe is merged over it, and the run's `recipe.json` holds the result. It
decides nothing that a person could not write, and knows no component.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import Any

from burnish.component import unfit
from burnish.rollouts import SamplingParams

_CLIPPED: dict[str, Any] = {"type": "ppo_clip", "clip_low": 0.2, "clip_high": 0.2}
_BY_TOKEN = {"aggregation": "token"}

PRESETS: dict[str, dict[str, Any]] = {
    # Shao et al., arXiv:2402.03300, eq. 3: the mean over rollouts of each one's mean. Without its KL of 0.04 in the
    # loss, which later work leaves out (DAPO, section 2.3) and which needs a reference: `loss: {kl_coef: 0.04}`.
    "grpo": {
        "advantage": {"type": "group_norm"},
        "loss": {**_CLIPPED, "aggregation": "sequence"},
    },
    # Liu et al., arXiv:2503.20783, section 3.2: no division by the group's spread or by a rollout's own length.
    "dr_grpo": {
        "advantage": {"type": "group_mean"},
        "loss": {**_CLIPPED, "aggregation": "constant"},
    },
    # Yu et al., arXiv:2503.14476, eq. 8 and section 4.1: clip-higher, the mean over tokens, dynamic sampling. Its soft
    # punishment of long answers is a reward: `rewards: [..., {type: overlong, ...}]`.
    "dapo": {
        "advantage": {"type": "group_norm"},
        "loss": {**_CLIPPED, "clip_high": 0.28, **_BY_TOKEN},
        "rollout": {"drop_uniform": True},
    },
    # Zheng et al., arXiv:2507.18071, eq. 5 and section 5.1.
    "gspo": {
        "advantage": {"type": "group_norm"},
        "loss": {"type": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence"},
    },
    # MiniMax-M1, arXiv:2506.13585, eq. 4 and 5: no lower bound; the upper one, which it does not print, is ScaleRL's
    # (Khatri et al., arXiv:2510.13786).
    "cispo": {
        "advantage": {"type": "group_norm"},
        "loss": {"type": "cispo", "min_ratio": 0.0, "max_ratio": 5.0, **_BY_TOKEN},
    },
    # Ahmadian et al., arXiv:2402.14740: a rollout is one action, so its log-probability is a sum; the KL is taken off
    # the reward, with a coefficient of TRL's.
    "rloo": {
        "advantage": {"type": "leave_one_out"},
        "loss": {"type": "reinforce", "aggregation": "constant", "constant_length": 1.0},
        "kl_penalty": {"coef": 0.05, "estimator": "k1"},
    },
    # Hu et al., arXiv:2501.03262, section 3: the KL of each token off its reward, with a coefficient of OpenRLHF's.
    "reinforce_pp": {
        "advantage": {"type": "reinforce_pp", "gamma": 1.0, "baseline": "none"},
        "loss": {**_CLIPPED, **_BY_TOKEN},
        "kl_penalty": {"coef": 0.01, "estimator": "k1"},
    },
    # Schulman et al., arXiv:1707.06347, in the form of Ouyang et al., arXiv:2203.02155: four passes, the KL off the
    # rewards; coefficients of TRL's. The model needs a second head:
    # `model.head: {type: multi, heads: {lm: {type: lm}, value: {type: scalar}}}`.
    "ppo": {
        "advantage": {"type": "gae", "gamma": 1.0, "lam": 0.95},
        "loss": {"type": "ppo", "clip_low": 0.2, "clip_high": 0.2, "value_coef": 0.1, "value_clip": 0.2, **_BY_TOKEN},
        "kl_penalty": {"coef": 0.05, "estimator": "k1"},
        "num_passes": 4,
    },
    # GRPO whose ratio is against the engine's own log-probabilities, with every update proved: for float32, where the
    # embedded engine and the policy must say the same.
    "aligned": {
        "advantage": {"type": "group_norm"},
        "loss": {**_CLIPPED, "aggregation": "sequence", "old_logprobs": "rollout"},
        "rollout": {
            "engine": {"type": "embedded"},
            "max_policy_lag": 0,
            "alignment": {"every": 1, "max_difference": 1e-5, "action": "refuse"},
        },
    },
}


def expand(preset: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, fields of a workflow as a recipe has them, over those of a preset.

    What is given stands, None included; blocks are merged key by key. A block of another `type` than the preset's is
    the recipe's whole. With `aggregation: constant` and no `constant_length`, that is the given (or default)
    `rollout.sampling.max_new_tokens`. Expanding what was expanded changes nothing.

    >>> expand("dapo", {"loss": {"clip_high": 0.3}})["loss"]
    {'type': 'ppo_clip', 'clip_low': 0.2, 'clip_high': 0.3, 'aggregation': 'token'}

    Raises:
        ValueError: there is no such preset.
    """
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise unfit(f"no preset '{preset}'", f"{hint}one of: {', '.join(PRESETS)}", "preset")
    merged = _over(PRESETS[preset], given)
    loss = merged["loss"]
    if isinstance(loss, dict) and loss.get("aggregation") == "constant" and "constant_length" not in loss:
        loss["constant_length"] = float(_max_new_tokens(merged))
    return merged


def _over(preset: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    if given.get("type", preset.get("type")) != preset.get("type") and "type" in preset:
        return copy.deepcopy(dict(given))
    merged = copy.deepcopy(dict(preset))
    for name, value in given.items():
        below = merged.get(name)
        merged[name] = _over(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged


def _max_new_tokens(fields: Mapping[str, Any]) -> Any:
    """As it is given, or its default. What cannot be a number is refused where it stands."""
    given: Any = fields
    for name in ("rollout", "sampling", "max_new_tokens"):
        given = given.get(name) if isinstance(given, Mapping) else None
    return given if isinstance(given, int) else SamplingParams().max_new_tokens
