"""Adapted tiny models, moved off their first values, and the same adapter in plain PEFT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from burnish.model.adapters.lora import LoRA, without_known_warnings
from burnish.model.adapters.weights import adapter_tensors
from burnish.model.policy_model import PolicyModel
from burnish.model.shards import gathered
from tests.policy_model_helpers import gradients
from tests.tiny_models import VOCAB_SIZE, tiny_model

PADDED = 128
"""Rows of a padded vocabulary of 96, and a number that no other axis of a tiny model has."""

VARIANTS = {
    "rslora": LoRA(r=4, use_rslora=True),
    "dora": LoRA(r=4, use_dora=True),
    "embedding and head": LoRA(r=4, target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "embedding and head, dora": LoRA(r=4, use_dora=True, target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "saved head and norms": LoRA(r=4, modules_to_save=["lm_head", "norm", "input_layernorm"]),
    "saved embedding, dora": LoRA(r=4, use_dora=True, modules_to_save=["embed_tokens"]),
}


def adapted(family: str, lora: LoRA, *, seed: int = 0, pad_vocab_to: int = 1, **overrides: Any) -> PolicyModel:
    """A tiny model of `family` with an adapter that was not trained."""
    model = PolicyModel.from_hf(tiny_model(family, **overrides), pad_vocab_to=pad_vocab_to)
    lora.apply(model, seed=seed)
    return model


@torch.no_grad()
def move_off_zero(model: PolicyModel) -> None:
    """What a few steps would do: B is no longer zero. What belongs to padding rows stays zero, as in training."""
    generator = torch.Generator().manual_seed(1)
    for _, parameter in model.trainable_parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for axis, size in enumerate(parameter.shape):
            if size == PADDED:
                parameter.narrow(axis, VOCAB_SIZE, PADDED - VOCAB_SIZE).zero_()


def in_peft(model: PolicyModel, lora: LoRA, family: str, **overrides: Any) -> Any:
    """`get_peft_model` around the plain transformers model, with the adapter that `model` has."""
    from peft import get_peft_model, set_peft_model_state_dict

    config = lora.peft_config(PolicyModel.from_hf(tiny_model(family, **overrides)))
    with without_known_warnings():
        theirs: Any = get_peft_model(tiny_model(family, **overrides), config)
    written = gathered(adapter_tensors(model))
    result = set_peft_model_state_dict(theirs, written)
    trained = [name for name, parameter in theirs.named_parameters() if parameter.requires_grad]
    assert not result.unexpected_keys and not set(result.missing_keys) & set(trained)
    assert len(written) == len(trained)
    return theirs


def gradients_without_padding(model: PolicyModel) -> dict[str, Tensor]:
    """The gradients; of padding rows there must be none."""
    found = {}
    for name, gradient in gradients(model).items():
        for axis, size in enumerate(gradient.shape):
            if size == PADDED:
                assert not gradient.narrow(axis, VOCAB_SIZE, PADDED - VOCAB_SIZE).any(), name
                gradient = gradient.narrow(axis, 0, VOCAB_SIZE)
        found[name] = gradient
    return found
