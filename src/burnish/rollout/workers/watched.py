"""What all workers beside the training process have in a recipe: how many, and when one is given up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt

from burnish.rollout.fleet import Workers

if TYPE_CHECKING:
    from burnish.rollout.fleet import Parts
    from burnish.rollout.pool import Pool
    from burnish.rollout.pool_worker import Limits, Starter


class Watched(Workers):
    """Engines in processes of their own, beside training."""

    num_workers: Annotated[int, Ge(1)] = 1
    """Processes, each with an engine of its own."""
    max_restarts: Annotated[int, Ge(0)] = 10
    """A worker may end or hang so often without finishing a request, and a request be in flight at so many ends of
    workers, before the run is given up. One that cannot even be opened, because its machine is gone, ends no run in
    which others finish requests: it is tried again and again, each time with an event."""
    heartbeat_seconds: Annotated[float, Gt(0)] = 120.0
    """A worker that is silent for so long is taken for hung, killed and started anew. Longer than the longest step of
    the engine, a prefill or a compilation, and than it takes to read new weights."""
    start_seconds: Annotated[float, Gt(0)] = 600.0
    """The same while it starts and loads its engine."""
    sync_seconds: Annotated[float, Gt(0)] = 300.0
    """A worker has so long to take new weights, from when it is told; then the run fails."""

    def limits(self) -> Limits:
        """What its workers are watched by."""
        from burnish.rollout.pool_worker import Limits

        return Limits(self.heartbeat_seconds, self.start_seconds, self.sync_seconds, self.max_restarts)

    def pool(self, starter: Starter[Any], parts: Parts) -> Pool:
        """Its workers, which `starter` starts; it is closed where they cannot be."""
        from burnish.rollout.host import Open
        from burnish.rollout.pool import Pool

        order = Open(parts.engine, parts.setup, parts.sync, beat_seconds=min(1.0, self.heartbeat_seconds / 10))
        try:
            sender = parts.sync.sender(parts.run_dir)
            return Pool(starter, self.num_workers, order, parts.engine.capacity, sender, self.limits(), parts.event)
        except BaseException:
            starter.close()  # a cluster may have been started for them
            raise
