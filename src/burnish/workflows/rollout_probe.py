"""Whether engines and policy say the same of a token: after a sync, and of what a step trains on.

A receipt proves that the bytes arrived; that the engine computes with them is proved by what it says next. Every worker
continues a prompt, and the policy is asked about the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import cycle
from typing import TYPE_CHECKING

from burnish.errors import SyncFailed
from burnish.rollout.alignment import Alignment, Mismatch, judge, measure
from burnish.rollouts import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable

    from burnish.rollout.collector import Collector
    from burnish.rollouts import Prompt
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
        # The second one is the first behind an update: an adapter's first weights change nothing, applied or not.
        if self._syncs != 1 and self._syncs % self.config.every:
            return
        # Uncut, as the policy's own probabilities are.
        params = SamplingParams(
            temperature=self.sampling.policy_temperature,
            max_new_tokens=self.config.num_tokens,
            stop_token_ids=self.sampling.stop_token_ids,
        )
        groups = stream.sample(self.prompts, params, 1, "probe")
        if not groups:  # a signal asks to stop, or there is no prompt to ask
            return
        found = mismatch(stream, stream.packed(groups))
        if found.num_tokens:
            self.last = found
        verdict = judge(found, self.limit)
        if verdict.aligned:
            return
        if self.config.action == "refuse":
            raise SyncFailed(f"after the sync of policy {stream.version}, {verdict.words}")
        self.event("misaligned", version=stream.version, said=verdict.words)

    def prompts(self, collector: Collector) -> list[Prompt]:
        """One for each worker at least, the same ones again where there are more workers, with other seeds."""
        found = collector.probe_prompts(self.config.num_prompts)
        count = max(len(found), collector.fleet.num_workers) if found else 0
        return [replace(prompt, index=place) for place, prompt in zip(range(count), cycle(found), strict=False)]

    def is_due(self) -> bool:
        """Whether a step of the policy that was synced last is to be measured as a whole."""
        return self._syncs % self.config.every == 0


def mismatch(stream: RolloutStream, batch: Batch) -> Mismatch:
    """Of all sampled tokens of a batch, under the policy as it is now and the engines as they were."""
    now = batch.read(stream.policy.logprobs(batch.blocks, trained_only=True))
    return measure(now.numpy(), batch.read_column("rollout_logprobs").numpy())
