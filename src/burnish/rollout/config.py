"""The `rollout:` block of workflows that train on what the policy itself says."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt

from burnish.component import Config, Free, OneOf
from burnish.environments.base import Environment
from burnish.rollout.alignment import Alignment
from burnish.rollout.engine import Engine
from burnish.rollout.fleet import Workers
from burnish.rollout.sync.base import WeightSync
from burnish.rollouts import SamplingParams

ENGINES = OneOf("burnish.rollout.engines", default="embedded")
WORKERS = OneOf("burnish.rollout.workers", default="inline")
SYNCS = OneOf("burnish.rollout.sync", default="shared_memory")
ENVIRONMENTS = OneOf("burnish.environments", default="single_turn")


class RolloutConfig(Config):
    """How completions are sampled, and how far training may run ahead of them."""

    group_size: Annotated[int, Ge(1)] = 8
    """Rollouts of each prompt. `global_batch_size` counts prompts here, so a step has `global_batch_size * group_size`
    rollouts."""
    sampling: SamplingParams = SamplingParams()
    """How tokens are drawn."""
    environment: Annotated[Environment, ENVIRONMENTS] = ENVIRONMENTS.field(Environment)
    """What answers the policy between its turns; by default nothing does, and a rollout is one turn."""
    engine: Annotated[Engine, ENGINES, Free()] = ENGINES.field(Engine)
    """What samples."""
    workers: Annotated[Workers, WORKERS, Free()] = WORKERS.field(Workers)
    """Where engines run: in the training process, or in others beside it."""
    sync: Annotated[WeightSync, SYNCS, Free()] = SYNCS.field(WeightSync)
    """How new weights get to engines in other processes."""
    max_policy_lag: Annotated[int, Ge(0)] = 0
    """Updates of the policy between the weights that drew a token and those that train on it, at most. 0: strictly
    on-policy, sampling and training take turns. Above, they run at the same time."""
    on_stale: Literal["wait", "drop"] = "wait"
    """`wait`: a prompt is begun only once its rollouts cannot grow too old before they are trained on. `drop`: the
    engines go on at once, and a group that grew too old is thrown away and sampled again."""
    drop_uniform: bool = False
    """Leave out groups whose rewards are all equal, which teach nothing, and ask further prompts instead
    (dynamic sampling: Yu et al., DAPO, arXiv:2503.14476, section 3.2)."""
    oversample: Annotated[float, Ge(1)] = 1.0
    """Ask so many times the prompts of a step at once, in anticipation of groups that are left out."""
    max_draws: Annotated[int, Ge(1)] = 20
    """The run fails once a step has asked so many times its prompts and still lacks groups."""
    reward_workers: Annotated[int, Ge(1), Free()] = 1
    """Processes that compute rewards and environments."""
    max_silence_seconds: Annotated[float, Gt(0), Free()] = 600.0
    """Without any completion or reward for so long the run fails, and says what it waits for."""
    alignment: Annotated[Alignment, Free()] = Alignment()
    """How far the engine's log-probabilities may be from the policy's."""
    keep: Annotated[Literal["all", "last"], Free()] = "all"
    """Which steps' rollouts stay readable in the run folder (`burnish data RUN --rollouts`)."""
