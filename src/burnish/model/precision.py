"""Which precision each parameter is kept in, and which it is used in.

    dtype      frozen parameters    trained parameters          gradients summed over ranks
    float32    float32              float32                     float32
    bfloat16   bfloat16             float32, used in bfloat16   float32

A trained parameter needs the float32 copy: bfloat16 has 8 bits of mantissa, so a step smaller than 1/256 of a weight,
which is nearly every step of fine-tuning, would round away. float16 is refused for training: without loss scaling,
gradients below 6e-8 vanish, and bfloat16 needs none.
"""

from __future__ import annotations

import torch
from torch import nn

from burnish.errors import ModelError


def keep_masters(model: nn.Module, dtype: torch.dtype) -> None:
    """Stores every trained parameter in float32.

    Raises:
        ModelError: float16.
    """
    if dtype == torch.float16:
        raise ModelError("float16 cannot be trained without loss scaling", where="model.dtype", cure="use bfloat16")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
