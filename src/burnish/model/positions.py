"""How long a document may be: a table of learned positions has an end, and rotary embeddings have a longest length that
they were trained at. Asked of configurations alone, before any weight is read.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from burnish.errors import ModelError

if TYPE_CHECKING:
    from burnish.model.config import ModelConfig


def require_positions(config: ModelConfig, hf_config: Any, max_length: int) -> None:
    """Raises ModelError where a document of `max_length` tokens would run over the end of a table of positions."""
    positions = table_length(config, hf_config)
    if positions is not None and positions < max_length:
        raise ModelError(
            f"documents of {max_length:,} tokens, and {config.name} has a table of {positions:,} learned positions",
            where="data.max_length",
            cure=f"lower it to {positions}, and say by data.over_length what becomes of longer documents; or take "
            f"{'more positions for the fresh model' if config.path is None else 'a model with more positions'}",
        )


def table_length(config: ModelConfig, hf_config: Any) -> int | None:
    """Positions in the model's table of learned ones; None where it has no such table.

    The table is known by its size: an embedding beside that of the tokens, with a row for each position. OPT's and
    BioGPT's begin with two rows that stand for none. Without rotary embeddings the model is built on the meta device to
    look, which takes 0.1 to 0.4 s.
    """
    import torch
    from transformers import AutoModelForCausalLM

    positions = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    if positions is None or is_rotary(hf_config):
        return None
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(deepcopy(hf_config), trust_remote_code=config.trust_remote_code)
    tokens = module.get_input_embeddings()
    tables = [m for m in module.modules() if isinstance(m, torch.nn.Embedding) and m is not tokens]
    return positions if any(0 <= table.num_embeddings - positions <= 2 for table in tables) else None


def untrained_positions(config: ModelConfig, hf_config: Any, max_length: int) -> str | None:
    """What a person should know where documents of `max_length` tokens go beyond what rotary embeddings were trained
    at; None where they do not."""
    positions = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    if positions is None or max_length <= positions or not is_rotary(hf_config):
        return None
    return f"data.max_length is {max_length:,}, and {config.name} was made for {positions:,} positions"


def is_rotary(hf_config: Any) -> bool:
    """Whether positions turn queries and keys, by formula."""
    return getattr(hf_config.get_text_config(), "rope_parameters", None) is not None
