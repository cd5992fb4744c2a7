"""What `burnish check` says of a run on many ranks: what they exchange, and what failures and saves cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from burnish.commands._sizes import show
from burnish.policy.checkpoint.interval import DEVICE_HOURS, save_interval_seconds, time_lost

if TYPE_CHECKING:
    from burnish.model.plan import Plan
    from burnish.recipe import Recipe

START_SECONDS = 120.0
"""From a failure to the first rank that reads: noticed, processes started, torch and transformers imported, groups
joined. An assumption: nothing of this size was run."""
STORE_GBS = 5.0


class Stated(NamedTuple):
    """What nobody can measure from here."""

    store_gbs: float = STORE_GBS
    """GB (10^9 bytes) a second that the checkpoints' disk or store takes from all ranks together."""
    device_hours: float | None = None
    """Mean time between failures of one device; None: the recipe's, else `DEVICE_HOURS`."""


def layout(plan: Plan) -> str:
    """The mesh in words."""
    sizes = plan.sizes
    axes = " x ".join(f"{name} {size}" for name, size in zip(sizes._fields, sizes, strict=True))
    times = f"{plan.micro_batches} micro-batch{'es' * (plan.micro_batches > 1)}"
    return f"{axes} = {sizes.world:,} ranks; each computes {times} of {plan.work.micro_batch_size} rows a step"


def traffic(recipe: Recipe, plan: Plan) -> Iterator[str]:
    """A line for each axis and kind of exchange."""
    assert recipe.model.activation_checkpointing != "auto"
    found = plan.traffic(recipe.model.activation_checkpointing)
    for (axis, kind), size in sorted(found.items()):
        yield f"{axis:12} {show(size):>9}  {kind}"
    if found:
        watched = "" if plan.footprint is not None or plan.sizes.tp * plan.sizes.cp == 1 else ", but for tp and cp"
        yield f"{show(sum(found.values()))} reach each rank in a step{watched}; another model's passes are not counted"


def recovery(recipe: Recipe, plan: Plan, stated: Stated) -> Iterator[tuple[str, str]]:
    """(stage, text) of what a checkpoint takes, and of what failures then cost."""
    per_second, world = stated.store_gbs * 1e9, plan.sizes.world
    save_seconds = plan.checkpoint_bytes / per_second
    mine = 12 * plan.local_trained
    yield (
        "checkpoint",
        f"{show(plan.checkpoint_bytes)} in all, up to {show(mine)} a rank; {_time(save_seconds)} at "
        f"{stated.store_gbs:g} GB/s for all ranks together, beside training",
    )
    hours = recipe.checkpoint.mean_hours_between_failures
    if stated.device_hours is not None or hours is None:
        of_one = stated.device_hours or DEVICE_HOURS
        hours, why = of_one / world, f"{of_one:,.0f} device-hours / {world:,}"
    else:
        why = "checkpoint.mean_hours_between_failures"
    stored = sum(weight.stored * plan.numel(weight) for weight in plan.weights if not weight.trained)
    read = plan.sizes.dp_replicate * (plan.checkpoint_bytes + stored)
    restart = START_SECONDS + read / per_second
    best = save_interval_seconds(save_seconds, 3600 * hours)
    lost = time_lost(best, save_seconds, restart, 3600 * hours)
    yield (
        "recovery",
        f"a failure every {_time(3600 * hours)} ({why}); the interval that loses least is {_time(best)}, and then "
        f"{lost:.1%} of the time goes to saves, repeated work and restarts",
    )
    yield (
        "recovery",
        f"a restart takes {_time(restart)}: {START_SECONDS:.0f} s assumed to begin, and {_time(read / per_second)} to "
        f"read {show(read)}",
    )


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
