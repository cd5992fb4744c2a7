"""Four-bit bases, on the CPU: needs bitsandbytes, which `make test` does not install."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.mesh import open_mesh
from burnish.model.adapters.qlora import QLoRA
from burnish.model.adapters.weights import frozen_weight
from burnish.model.config import ModelConfig
from burnish.model.export import export
from burnish.model.load import load_model
from burnish.model.policy_model import PolicyModel
from tests import tiny_run
from tests.lora_helpers import move_off_zero
from tests.policy_model_helpers import pack, packed_loss, plain_loss, random_documents
from tests.tiny_models import tiny_model

pytest.importorskip("bitsandbytes")

DOCUMENTS = random_documents([11, 6, 3], 96)
BLOCK = pack(DOCUMENTS, 24)
IDS = torch.tensor([DOCUMENTS[0]])
VARIANTS = {
    "plain": QLoRA(r=4),
    "dora": QLoRA(r=4, use_dora=True),
    "fp4, some layers": QLoRA(r=4, quant_type="fp4", use_double_quant=False, target_modules=["q_proj", "lm_head"]),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_model("llama", hidden_size=64, head_dim=16).save_pretrained(tmp_path / "base")
    tiny_run.write_tokenizer(tmp_path / "base")
    return tmp_path / "base"


def load(base: Path, qlora: QLoRA, dtype: Any = "float32") -> PolicyModel:
    with open_mesh("cpu") as mesh:
        return load_model(ModelConfig(path=str(base), dtype=dtype, adapter=qlora), mesh, seed=0)


def plain_four_bits(base: Path, qlora: QLoRA) -> Any:
    """What anybody would get from transformers."""
    from transformers import AutoModelForCausalLM

    arguments = qlora.load_arguments("float32")
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.float32, **arguments)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval().logits(BLOCK)[:11] if isinstance(model, PolicyModel) else model(IDS).logits[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_base_is_what_transformers_rounds_it_to(variant: str, base: Path) -> None:
    model, plain = load(base, VARIANTS[variant]), plain_four_bits(base, VARIANTS[variant])
    fresh = logits(model)
    torch.testing.assert_close(fresh, logits(plain), rtol=0, atol=2e-5)
    assert (fresh - logits(tiny_model("llama", hidden_size=64, head_dim=16))).abs().max() > 0.5
    # 64 x 64 weights are 2,048 bytes; what is no linear layer of the backbone stays what it was.
    assert frozen_bytes(model, "model.layers.0.self_attn.o_proj") == 64 * 64 // 2
    assert model.causal_lm.model.embed_tokens.weight.dtype == torch.float32
    move_off_zero(model)
    assert (logits(model) - fresh).abs().max() > 0.1
    with VARIANTS[variant].off(model):
        assert torch.equal(logits(model), fresh)


def frozen_bytes(model: PolicyModel, name: str) -> int:
    layer: Any = model.get_submodule(name)
    weight = getattr(layer, "base_layer", layer).weight
    return weight.numel() * weight.element_size()


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_the_rounded_weights(variant: str, base: Path) -> None:
    """The same adapter on a full-precision model whose weights are the rounded ones."""
    model = load(base, VARIANTS[variant])
    move_off_zero(model)
    merged = tiny_model("llama", hidden_size=64, head_dim=16)
    merged.load_state_dict(dict(model.hf_tensors(merge=True)))
    model.train()
    loss, expected = packed_loss(model, DOCUMENTS, 24), plain_loss(merged, DOCUMENTS)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    expected.backward()
    loss.backward()
    # W' = W + 8 B A for LoRA: dB is 8 dW' A^T.
    layer: Any = model.get_submodule("model.layers.0.self_attn.q_proj")
    if not VARIANTS[variant].use_dora:
        d_weight = merged.model.layers[0].self_attn.q_proj.weight.grad
        found, wanted = layer.lora_B.default.weight.grad, 8 * d_weight @ layer.lora_A.default.weight.T
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * wanted.abs().max().item())
    assert all((parameter.grad is None) != parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_and_as_an_adapter_it_says_the_same(variant: str, base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = load(base, VARIANTS[variant]), AutoTokenizer.from_pretrained(base)
    move_off_zero(model)
    export(model, tokenizer, tmp_path / "adapter", merge=False, base_path=str(base))
    export(model, tokenizer, tmp_path / "merged", merge=True, base_path=str(base))
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=5e-5)
    layer = model.get_submodule("model.layers.1.self_attn.k_proj")
    if variant != "fp4, some layers":
        assert {p.dtype for p in merged.parameters()} == {torch.float32}
        return
    # A layer without an adapter is written as the rounded floats.
    assert torch.equal(merged.model.layers[1].self_attn.k_proj.weight, frozen_weight(layer))


def test_a_run_in_bfloat16(base: Path) -> None:
    model = load(base, VARIANTS["plain"], dtype="bfloat16")
    optimizer = torch.optim.SGD([parameter for _, parameter in model.trainable_parameters()], lr=0.01)
    losses = []
    for _ in range(4):
        loss = packed_loss(model.train(), DOCUMENTS, 24)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    assert all(parameter.dtype == torch.float32 for _, parameter in model.trainable_parameters())
