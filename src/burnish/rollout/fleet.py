"""Where requests go and completions come from, wherever engines run.

The collector speaks to a `Fleet` and knows neither processes nor clusters. A fleet loses no request: what a dead or
hung worker had is submitted again to another, by its id, and a worker that was started anew samples nothing before it
holds the published weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from burnish.component import Component

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from burnish.model.policy_model import PolicyModel
    from burnish.rollout.engine import Engine, EngineSetup, Receipt
    from burnish.rollout.sync.base import WeightSync
    from burnish.rollouts import Completion, Request

Event = Callable[..., None]
"""`event(kind, **facts)`: something for the run's events."""


def idle() -> None:
    """Nobody waits for a sign of life."""


class Fleet(Protocol):
    """One or more engines. Used by one thread at a time."""

    def submit(self, requests: Sequence[Request], *, first: bool = False) -> None:
        """Queues them; `first`: before all that wait. Ids are new, or were finished before."""
        ...

    def poll(self, seconds: float) -> list[Completion]:
        """What finished since the last call; returns as soon as there is some, else after about `seconds`. Looks after
        the workers on the way.

        Raises:
            RestartsExhausted: workers died or hung more often than allowed.
            SyncFailed: a restarted worker could not be given the published weights.
            UserError: an engine refuses what it was made for.
        """
        ...

    def abort(self) -> None:
        """Forgets all requests; none of them is heard of again."""
        ...

    def publish(
        self,
        version: int,
        tensors: Callable[[], Iterator[tuple[str, Tensor]]],
        folder: Path | None,
        *,
        adapter_only: bool = False,
        alive: Callable[[], None] = idle,
    ) -> list[Receipt]:
        """Brings a version to every worker and returns what each holds, or raises; kept for workers that start later.

        Args:
            tensors: makes an iterator over what `Weights.tensors` will give. Called once at most: not at all where the
                engine samples from the policy's own model.
            folder: configuration and tokenizer of the model, for engines that read Hugging Face folders.
            adapter_only: whether `tensors` are the adapter's alone.
            alive: called again and again while workers are waited for.

        Raises:
            SyncFailed: a worker does not hold what was sent, or did not say so in time.
        """
        ...

    @property
    def num_workers(self) -> int: ...

    @property
    def capacity(self) -> int:
        """Requests that all workers run at once; more are queued."""
        ...

    def sleep(self, alive: Callable[[], None] = idle) -> None:
        """Before an update of the policy on the same device; nothing is in flight. `alive`: as in `publish`."""
        ...

    def wake(self, alive: Callable[[], None] = idle) -> None: ...

    def facts(self) -> dict[str, float]:
        """Sums of the engines' `facts`, and `restarts`, `resubmitted`, `workers`."""
        ...

    def close(self) -> None:
        """Ends all that it started."""
        ...


class Parts(NamedTuple):
    """What a fleet is made of, beside the workers' own fields."""

    engine: Engine
    setup: EngineSetup
    sync: WeightSync
    model: PolicyModel | None
    """The policy's own, for an engine in this process."""
    run_dir: Path
    event: Event
    """Told of starts, deaths, hangs and refits of workers, with their process ids."""


class Workers(Component):
    """Where engines run, chosen by `rollout.workers: {type: inline | processes | ray}`."""

    def open(self, parts: Parts) -> Fleet:
        """Starts them. Raises UserError: what they need is not there."""
        raise AssertionError(f"{type(self).__name__} cannot be opened")

    @property
    def beside(self) -> bool:
        """Whether engines run while the policy trains."""
        return True

    def options(self) -> dict[str, Any]:
        """For people: what was started."""
        return self.model_dump(exclude={"type"})
