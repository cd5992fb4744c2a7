"""What is watched without memory is what a real forward pass keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from burnish.model.adapters.lora import LoRA
from burnish.model.footprint import Recompute, footprint
from burnish.model.parallel import recompute_layers
from burnish.model.policy_model import PolicyModel
from tests.policy_model_helpers import pack, random_documents
from tests.tiny_models import tiny_config

T = 256
SHAPE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 8, "head_dim": 16}
SHAPE |= {"num_hidden_layers": 4}  # of which two run, and stand for all
WINDOWED = {"sliding_window": 128}
CASES: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "llama": ("llama", {}, torch.float32),
    "llama, bfloat16": ("llama", {}, torch.bfloat16),
    "lora": ("llama", {"lora": True}, torch.float32),
    "qwen3": ("qwen3", {}, torch.float32),
    "gemma2": ("gemma2", WINDOWED, torch.bfloat16),
    "gemma3": ("gemma3", WINDOWED | {"layer_types": ["sliding_attention", "full_attention"] * 2}, torch.float32),
    "gpt_neox": ("gpt_neox", {}, torch.float32),
    "dense layers, then experts": ("qwen3_moe", {"mlp_only_layers": [0]}, torch.bfloat16),
    "gpt_oss": ("gpt_oss", WINDOWED, torch.bfloat16),
}


def build(case: str, device: str) -> PolicyModel:
    family, options, dtype = CASES[case]
    config = tiny_config(family, **SHAPE, **{k: v for k, v in options.items() if k != "lora"})
    with torch.device(device):
        torch.manual_seed(0)
        model = PolicyModel.from_hf(AutoModelForCausalLM.from_config(config, dtype=dtype))
    if "lora" in options:
        LoRA(r=4, lora_dropout=0.1).apply(model, seed=0)
    return model


class Alive(TorchDispatchMode):
    """Storages that operators made, and which of them are still held by something."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def num_bytes(self, model: PolicyModel) -> int:
        weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        return sum(n for key, (ref, n) in self.made.items() if key not in weights and not ref.expired())


RECOMPUTED: dict[str, tuple[Recompute, ...]] = dict.fromkeys(("lora", "gpt_neox", "gemma2"), ("selective", "full"))


@pytest.mark.parametrize("case", CASES)
def test_bytes_kept_are_those_of_a_real_pass(case: str) -> None:
    predicted = footprint(build(case, "meta"), T, CASES[case][2], {})
    largest = max(layer.all for layer in predicted.layers)
    for mode in ("none", *RECOMPUTED.get(case, ())):
        model, block = build(case, "cpu").train(), pack(random_documents([T // 2, T // 2], 90), T, T // 8)
        if mode != "none":
            recompute_layers(model, selective=mode == "selective")
        with Alive() as alive:
            hidden = model.hidden_states(block)
        real = alive.num_bytes(model)
        assert hidden.requires_grad
        # While a layer is computed again its tensors are there too; here no layer is.
        expected = predicted.kept(mode) - (largest if mode != "none" else 0)
        assert expected == pytest.approx(real, rel=0.01), (mode, expected, real)


def test_no_gradient_keeps_nothing() -> None:
    model = build("llama", "meta").requires_grad_(False)
    assert sum(layer.all for layer in footprint(model, T, torch.float32, {}).layers) == 0


def test_experts_in_float32_are_twice_those_in_bfloat16() -> None:
    """torch refuses fake float32 tensors in a grouped product."""
    model = build("dense layers, then experts", "meta")
    half = footprint(model, T, torch.bfloat16, {})
    assert footprint(model, T, torch.float32, {}).kept("none") == 2 * half.kept("none")
