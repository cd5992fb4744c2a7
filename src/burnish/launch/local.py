"""Running a recipe in this process, or as the rank of many that its environment says it is."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from burnish.launch.base import Launch

if TYPE_CHECKING:
    from burnish.recipe import Recipe


class Local(Launch):
    """This process, on the GPU if there is one; under torchrun or `srun` one rank of those that were started."""

    type: Literal["local"] = "local"

    def run(self, recipe: Recipe, *, json_lines: bool = False) -> int:
        """Trains to the end and exports."""
        from burnish.launch.rank import run_rank

        os.environ |= slurm_ranks(os.environ)
        return run_rank(recipe, json_lines=json_lines)


def slurm_ranks(environment: os._Environ[str] | dict[str, str]) -> dict[str, str]:
    """What torchrun would have set, from what SLURM's `srun` sets; nothing elsewhere.

    `SLURM_STEP_NUM_TASKS` is there under `srun` only: a batch script's own shell has SLURM_NTASKS and is no rank.
    """
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return {}
    first = environment.get("MASTER_ADDR") or _first_host(environment["SLURM_STEP_NODELIST"])
    # Every rank must come to the same port, and two jobs of a node to two.
    port = 20_000 + (int(environment["SLURM_JOB_ID"]) * 8 + int(environment.get("SLURM_STEP_ID", "0"))) % 20_000
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": first,
        "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
    }


def _first_host(nodes: str) -> str:
    """`gpu-03` of `gpu-[03-05,9],cpu1`: SLURM's way to write a list of hosts."""
    first, bracket, rest = nodes.partition("[")
    if not bracket or "," in first:
        return nodes.partition(",")[0]
    inside, _, after = rest.partition("]")
    return first + inside.partition(",")[0].partition("-")[0] + after.partition(",")[0]
