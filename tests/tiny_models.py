"""Tiny Hugging Face models of every family that the numerics tests cover: a few thousand parameters each.

The stock initialisation (std 0.02) leaves attention scores near zero, where a soft cap, a wrong scale or a missing sink
changes nothing that a tolerance would notice. Here weights are drawn from `scale / sqrt(fan_in)`, so scores exceed 1.
"""

from __future__ import annotations

from typing import Any

FAMILIES = ("llama", "qwen3", "qwen3_moe", "gemma2", "gemma3", "gpt_oss", "gpt_neox")
"""Families that must equal plain transformers when packed."""
LEAKY_FAMILIES = ("lfm2", "qwen3_next")
"""Families whose convolutions or linear attention run over document borders."""

VOCAB_SIZE = 96

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "final_logit_softcapping": 20.0}

_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 8},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, **_MOE},
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 2.0},
    "gemma3": {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {
        "head_dim": 8,
        "sliding_window": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
    },
    "gpt_neox": {"num_key_value_heads": None},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16},
    "qwen3_next": {
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "shared_expert_intermediate_size": 16,
        **_MOE,
    },
}
_MODEL_TYPE = {"gemma3": "gemma3_text"}


def tiny_config(family: str, **overrides: Any) -> Any:
    """The Hugging Face configuration of a tiny model of `family` (any model type); `overrides` replace its fields."""
    from transformers import AutoConfig

    fields = {**_COMMON, **_FAMILY.get(family, {}), **overrides}
    return AutoConfig.for_model(
        _MODEL_TYPE.get(family, family), **{name: value for name, value in fields.items() if value is not None}
    )


def tiny_model(
    family: str, seed: int = 0, scale: float = 2.0, attn_implementation: str = "eager", **overrides: Any
) -> Any:
    """A causal language model of `family` in float32 and eval mode, the same for the same seed on every machine.

    Matrices are normal with std `scale / sqrt(fan_in)`, vectors (norms, biases, sinks) are moved by a normal of std 0.1
    (sinks: 1.0) from where they start, so that no parameter is at a value where its gradient or effect vanishes.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)  # gpt-oss draws its biases and sinks at construction
        model = AutoModelForCausalLM.from_config(
            tiny_config(family, **overrides), attn_implementation=attn_implementation, dtype=torch.float32
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise * (scale * parameter.shape[-1] ** -0.5))
            else:
                parameter.add_(noise * (1.0 if name.endswith("sinks") else 0.1))
    return model.eval()
