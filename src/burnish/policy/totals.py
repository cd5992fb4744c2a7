"""What the micro-batches of a step add up to, over all ranks: losses, counts and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from burnish.mesh import Mesh
    from burnish.types import LossOutput, Metric


class Totals:
    """Keeps losses and metrics of micro-batches in float64 where they are, so that the host waits once a step.

    What is summed are the micro-batches' own numbers, exactly rounded: however the same micro-batches were dealt to
    ranks, the sums have the same bits.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.num_terms = 0
        self.rows: list[Tensor] = []

    def add(self, output: LossOutput, count: Tensor) -> None:
        """`count` is the loss's, shaped as its total."""
        assert self.names in ((), tuple(output.metrics)), "a loss names the same metrics for every block"
        self.names, self.num_terms = tuple(output.metrics), output.total.numel()
        parts = (output.total, count, *(value for pair in output.metrics.values() for value in pair))
        device = output.total.device
        row = torch.cat([torch.as_tensor(part, device=device).detach().double().reshape(-1) for part in parts])
        self.rows.append(row)

    def over_ranks(self, mesh: Mesh) -> tuple[dict[str, Metric], float]:
        """(metrics, what was minimised) over all micro-batches of all ranks, which have as many each.

        A loss whose terms are counted differently cannot say its value as one (sum, count) and leaves out `loss`: here
        it is (total[0] / count[0] + total[1] / count[1] + ..., 1).
        """
        if not self.rows:
            return {}, 0.0
        sums, terms = mesh.sum_rows(torch.stack(self.rows)), self.num_terms
        mean = sum(total / (count or 1.0) for total, count in zip(sums[:terms], sums[terms:], strict=False))
        pairs = sums[2 * terms :]
        metrics = {name: (pairs[2 * i], pairs[2 * i + 1]) for i, name in enumerate(self.names)}
        return {"loss": (mean, 1.0), **metrics}, mean
