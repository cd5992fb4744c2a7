"""Low-rank adapters on a base of four bits a weight, through bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from burnish.errors import ModelError
from burnish.model.adapters.lora import LoRA

if TYPE_CHECKING:
    from burnish.model.policy_model import PolicyModel


class QLoRA(LoRA):
    """`lora`, with the backbone's linear layers rounded to four bits as they are read, 64 weights to a scale.
    Embeddings, norms and head keep `model.dtype`. Dettmers et al., arXiv:2305.14314.

    What is trained, and what a merge writes, is an adapter of the rounded weights: their floats plus the update. The
    unrounded weights play no part after loading.
    """

    type: Literal["qlora"] = "qlora"
    frozen_bytes: ClassVar[float | None] = 0.5 + 4 / 64
    """Four bits, and at most one float32 for 64 of them."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 16 values: `nf4`, the quantiles of a normal distribution, or `fp4`, a float of four bits."""
    use_double_quant: bool = True
    """Round the scales too, to a byte each: 0.37 bits a weight less."""

    def load_arguments(self, dtype: str) -> dict[str, Any]:
        """transformers' quantization config; products are taken in `dtype`.

        Raises:
            ModelError: bitsandbytes is not installed.
        """
        _require_bitsandbytes()
        import torch
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.use_double_quant,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
        return {"quantization_config": config, "device_map": {"": "cpu"}}

    def apply(self, model: PolicyModel, *, seed: int) -> None:
        _require_bitsandbytes()
        super().apply(model, seed=seed)


def _require_bitsandbytes() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        cure = 'pip install "burnish[qlora]"; or train `type: lora` on unrounded weights'
        raise ModelError("four-bit weights need bitsandbytes", where="model.adapter", cure=cure)
