"""`workers: {type: processes, num_workers: 2}`: engines in processes of this machine, watched and restarted."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Literal, Self

from annotated_types import Ge, MinLen
from pydantic import model_validator
from pydantic_core import PydanticCustomError

from burnish.errors import UserError
from burnish.rollout.workers.watched import Watched

if TYPE_CHECKING:
    from burnish.rollout.fleet import Fleet, Parts


class Processes(Watched):
    """Engines in processes of this machine."""

    type: Literal["processes"] = "processes"
    num_threads: Annotated[int, Ge(1)] | Literal["auto"] = "auto"
    """Of each worker's operators on a CPU; `auto`: OMP_NUM_THREADS, or else the cores divided by `num_workers`."""
    cpus: Annotated[list[Annotated[int, Ge(0)]], MinLen(1)] | None = None
    """Cores that the workers may run on, by number; absent: all that this process may."""
    gpus: Annotated[list[Annotated[int, Ge(0)]], MinLen(1)] | None = None
    """GPUs of the workers by number, dealt out in order, the same count to each; absent: each sees what this process
    sees."""

    @model_validator(mode="after")
    def _gpus_are_dealt_out(self) -> Self:
        if self.gpus is not None and len(self.gpus) % self.num_workers:
            given = {"gpus": len(self.gpus), "workers": self.num_workers}
            raise PydanticCustomError("gpus", "{gpus} GPUs cannot be dealt out to {workers} workers evenly", given)
        return self

    def open(self, parts: Parts) -> Fleet:
        from burnish.rollout.host_process import ProcessStarter

        cores = os.sched_getaffinity(0) if sys.platform == "linux" else set(range(os.cpu_count() or 1))
        missing = sorted(set(self.cpus or ()) - cores)
        if missing:
            raise UserError(
                f"this process may not run on core {', '.join(map(str, missing))}",
                where="workflow.rollout.workers.cpus",
                cure=f"cores that it may run on: {', '.join(map(str, sorted(cores)))}",
            )
        auto = os.environ.get("OMP_NUM_THREADS") or str(max(len(self.cpus or cores) // self.num_workers, 1))
        environment = {"OMP_NUM_THREADS": auto if self.num_threads == "auto" else str(self.num_threads)}
        starter = ProcessStarter(environment, gpus=self._dealt(), cpus=self.cpus)
        return self.pool(starter, parts)

    def _dealt(self) -> list[list[int]] | None:
        if self.gpus is None:
            return None
        each = len(self.gpus) // self.num_workers
        return [self.gpus[at : at + each] for at in range(0, len(self.gpus), each)]
