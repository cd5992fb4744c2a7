"""Adam with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt, Interval, Len

from burnish.policy.optimizers.base import Optimizer

if TYPE_CHECKING:
    import torch

Beta = Annotated[float, Interval(ge=0, lt=1)]


class AdamW(Optimizer):
    """Loshchilov and Hutter, arXiv:1711.05101, algorithm 2, as `torch.optim.AdamW` in its fused form."""

    type: Literal["adamw"] = "adamw"
    learning_rate: Annotated[float, Gt(0)] = 2e-5
    """Peak learning rate; the schedule multiplies it. Adapters want ten times more than full fine-tuning."""
    betas: Annotated[list[Beta], Len(2, 2)] = [0.9, 0.999]
    """Decay rates of the running means of the gradient and of its square."""
    eps: Annotated[float, Ge(0)] = 1e-8
    """Added to the root of the second mean."""

    def open(
        self, parameters: Iterable[tuple[str, torch.nn.Parameter]], *, fused: bool = True
    ) -> torch.optim.Optimizer:
        import torch

        decayed, kept = [], []
        for name, parameter in parameters:  # fused experts have biases of two dimensions, [experts, hidden]
            (decayed if parameter.ndim >= 2 and not name.endswith("bias") else kept).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay, "lr_scale": 1.0},
            {"params": kept, "weight_decay": 0.0, "lr_scale": 1.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.learning_rate,
            betas=(self.betas[0], self.betas[1]),
            eps=self.eps,
            fused=fused,
            foreach=None if fused else False,
        )
