"""Whether engines and policy say the same of a token: after a sync, and of what a step trains on.

A receipt proves that the bytes arrived; that the engine computes with them is proved by what it says next. It continues
a few prompts, and the policy is asked about the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from burnish.errors import SyncFailed
from burnish.rollout.alignment import Alignment, Mismatch, judge, measure
from burnish.rollouts import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable

    from burnish.workflows.rollout_rows import Batch
    from burnish.workflows.rollout_stream import RolloutStream


@dataclass(slots=True)
class Probe:
    """Asked after every sync; the same answer on every rank.

    Args:
        limit: see `Alignment.limit`.
        sampling: of the run's rollouts.
        event: told of what is only warned of.
    """

    config: Alignment
    limit: float
    sampling: SamplingParams
    event: Callable[..., None]
    last: Mismatch | None = None
    """Of the last probe."""
    _syncs: int = 0

    def after_sync(self, stream: RolloutStream, *, first: bool) -> None:
        """Probes where it is due.

        Args:
            first: the engines have held no version of this process's yet.

        Raises:
            SyncFailed: the engine does not compute what the policy does.
        """
        self._syncs = 0 if first else self._syncs + 1
        if self._syncs % self.config.every:
            return
        # Uncut, as the policy's own probabilities are.
        params = SamplingParams(
            temperature=self.sampling.policy_temperature,
            max_new_tokens=self.config.num_tokens,
            stop_token_ids=self.sampling.stop_token_ids,
        )
        count = self.config.num_prompts
        groups = stream.sample(lambda collector: collector.probe_prompts(count), params, 1, "probe")
        batch = stream.packed(groups or [])
        if not batch.num_tokens:
            return
        self.last = mismatch(stream, batch)
        verdict = judge(self.last, self.limit)
        if verdict.aligned:
            return
        if self.config.action == "refuse":
            raise SyncFailed(f"after the sync of policy {stream.version}, {verdict.words}")
        self.event("misaligned", version=stream.version, said=verdict.words)

    def is_due(self) -> bool:
        """Whether a step of the policy that was synced last is to be measured as a whole."""
        return self._syncs % self.config.every == 0


def mismatch(stream: RolloutStream, batch: Batch) -> Mismatch:
    """Of all sampled tokens of a batch, under the policy as it is now and the engines as they were."""
    now = batch.read(stream.policy.logprobs(batch.blocks, trained_only=True))
    return measure(now.numpy(), batch.read_column("rollout_logprobs").numpy())
