"""What an optimizer component is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt

from burnish.component import Component

if TYPE_CHECKING:
    import torch


class Optimizer(Component):
    """Opens a torch optimizer over named parameters."""

    learning_rate: Annotated[float, Gt(0)]
    """Peak learning rate; the schedule multiplies it."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay, on matrices only: norms and biases never decay."""

    def open(
        self, parameters: Iterable[tuple[str, torch.nn.Parameter]], *, fused: bool = True
    ) -> torch.optim.Optimizer:
        """The live optimizer. A group's learning rate is the step's, times the `lr_scale` that every group carries.

        Args:
            fused: False: only operations whose result for a number does not depend on where in its tensor it stands.
        """
        raise AssertionError(f"{type(self).__name__} cannot be opened")
