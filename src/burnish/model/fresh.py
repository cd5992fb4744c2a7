"""A model from a description instead of a file: `model: {config: {model_type: llama, hidden_size: 64, ...}}`.

Owns what such a description may say, how the tokenizer completes it, and the draw of its weights. Must not know data.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import TYPE_CHECKING, Any

from burnish.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from burnish.model.config import ModelConfig

ATTENTION_DROPOUTS = ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob")
"""What families call the dropout of attention weights, which document-masked attention does not have."""


def for_tokenizer(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> ModelConfig:
    """`config` with the tokenizer's vocabulary size and special ids where it describes a fresh model and lacks them."""
    if config.config is None:
        return config
    # Not the padding's: packed rows have none to mask, and GPT-2 warns of it in every run that has one.
    special_ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos")}
    completed = {"vocab_size": len(tokenizer), **special_ids, **config.config}
    return config.model_copy(update={"config": completed})


def fresh_config(config: ModelConfig) -> Any:
    """The Hugging Face configuration that `model.config` describes.

    Raises:
        ModelError: no such family or field, a value that the family refuses, or dropout of attention weights.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    assert config.config is not None
    fields = dict(config.config)
    family = fields.pop("model_type")
    if family not in CONFIG_MAPPING:
        raise ModelError(
            f"transformers has no family '{family}'", "model.config.model_type", _near(family, CONFIG_MAPPING)
        )
    kind = CONFIG_MAPPING[family]
    known = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    for name in fields.keys() - known:
        raise ModelError(f"{kind.__name__} has no field '{name}'", f"model.config.{name}", _near(name, known))
    try:
        hf_config = AutoConfig.for_model(family, **fields)
    except (StrictDataclassError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(reason, "model.config", "correct the field that is named") from error
    for name in ATTENTION_DROPOUTS:
        if getattr(hf_config, name, None):
            reason = f"attention weights cannot be dropped, and this family's default is {getattr(hf_config, name)}"
            raise ModelError(reason, f"model.config.{name}", f"`{name}: 0.0`; the other dropouts work")
    return hf_config


def draw(hf_config: Any, *, dtype: str, attention: str | None, seed: int) -> Any:
    """The causal language model, its weights drawn on the CPU from `seed` by the family's own rules, in eval mode.

    The same on every rank, and untouched by whatever was drawn before; the global generator stays where it was.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        causal_lm: Any = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32, attn_implementation=attention)
    return causal_lm.to(getattr(torch, dtype)).eval()


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean `{near[0]}`?" if near else "see the family's configuration class in transformers' docs"
