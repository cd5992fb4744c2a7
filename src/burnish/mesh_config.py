"""The `mesh:` block of a recipe: how the ranks of a run share model, rows and tokens. Imports nothing heavy."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from annotated_types import Ge

from burnish.component import Config
from burnish.errors import RecipeError, UserError


class Sizes(NamedTuple):
    """Ranks along each axis, outermost first: rank r of 8 on (1, 4, 1, 2) has dp_shard r // 2 and tp r % 2."""

    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int

    @property
    def data(self) -> int:
        """Into how many shares a step's rows are dealt."""
        return self.dp_replicate * self.dp_shard

    @property
    def world(self) -> int:
        return self.dp_replicate * self.dp_shard * self.cp * self.tp


class MeshConfig(Config):
    """How many ranks stand along each axis. Their product is the number of ranks."""

    dp_replicate: Annotated[int, Ge(1)] = 1
    """Copies of the sharded model (HSDP): gradients are reduced within a copy, then between copies."""
    dp_shard: Annotated[int, Ge(1)] | Literal["rest"] = "rest"
    """Ranks that share one copy's parameters, gradients and optimizer state (FSDP2); `rest`: all that the other axes
    leave."""
    tp: Annotated[int, Ge(1)] = 1
    """Ranks that share every layer's heads and features, and the head's vocabulary (tensor parallel)."""
    cp: Annotated[int, Ge(1)] = 1
    """Ranks that share every row's tokens (context parallel), for documents too long for one."""

    def sizes(self, world_size: int) -> Sizes:
        """The axes' sizes for this many ranks.

        Raises:
            RecipeError: the axes do not multiply to it.
        """
        others = self.dp_replicate * self.tp * self.cp
        shard = world_size // others if self.dp_shard == "rest" else self.dp_shard
        sizes = Sizes(self.dp_replicate, shard, self.cp, self.tp)
        if sizes.world != world_size or shard == 0:
            step = others if self.dp_shard == "rest" else others * self.dp_shard
            below, above = world_size // step * step, -(-world_size // step) * step
            near = str(step) if self.dp_shard != "rest" else " or ".join(str(n) for n in (below, above) if n)
            problem = UserError(
                f"{world_size} ranks cannot be laid out as dp_replicate {self.dp_replicate} x dp_shard "
                f"{self.dp_shard} x cp {self.cp} x tp {self.tp}",
                where="mesh",
                cure=f"start {near} ranks, or change the axes: their product is the number of ranks",
            )
            raise RecipeError((problem,))
        return sizes
