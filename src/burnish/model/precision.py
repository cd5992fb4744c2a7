"""Which precision each parameter is kept in, and which it is used in.

    dtype      frozen parameters    trained parameters          gradients summed over ranks
    float32    float32              float32                     float32
    bfloat16   bfloat16             float32, used in bfloat16   float32

A trained parameter needs the float32 copy: bfloat16 has 8 bits of mantissa, so a step smaller than 1/256 of a weight,
which is nearly every step of fine-tuning, would round away. float16 is not offered: without loss scaling,
gradients below 6e-8 vanish, and bfloat16 needs none.
"""

from __future__ import annotations

from torch import nn


def keep_masters(model: nn.Module) -> None:
    """Stores every trained parameter in float32."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
