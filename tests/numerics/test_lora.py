"""LoRA: nothing changes at the start, gradients are PEFT's, merging is exact, initial values are reproducible."""

from __future__ import annotations

import pytest
import torch

from burnish.errors import ModelError
from burnish.model.adapters.lora import LoRA
from burnish.model.parallel import recompute_layers
from burnish.model.policy_model import PolicyModel
from tests.lora_helpers import adapted, in_peft, move_off_zero
from tests.policy_model_helpers import gradients, largest_difference, pack, packed_loss, plain_loss, random_documents
from tests.tiny_models import FAMILIES, tiny_model

DOCUMENTS = random_documents([11, 6, 3], 96)


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_logits_are_bit_equal_to_the_base_model(family: str) -> None:
    base, model = PolicyModel.from_hf(tiny_model(family)), adapted(family, LoRA())
    block = pack(DOCUMENTS, 24)
    with torch.no_grad():
        assert torch.equal(model.logits(block)[:20], base.logits(block)[:20])


def test_only_float32_adapters_train_and_all_of_them() -> None:
    model = PolicyModel.from_hf(tiny_model("llama").bfloat16())
    LoRA(r=4).apply(model, seed=0)
    trained = dict(model.trainable_parameters())
    # Two layers x seven projections x (A, B).
    assert len(trained) == 28
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert trained["model.layers.1.mlp.down_proj.lora_A.default.weight"].shape == (4, 48)
    assert {p.dtype for name, p in model.named_parameters() if name not in trained} == {torch.bfloat16}


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    name = "model.layers.0.self_attn.v_proj.lora_A.default.weight"
    everything = dict(adapted("llama", LoRA()).trainable_parameters())
    torch.manual_seed(999)
    values_only = dict(adapted("llama", LoRA(target_modules=["v_proj"])).trainable_parameters())
    other_seed = dict(adapted("llama", LoRA(), seed=1).trainable_parameters())
    assert torch.equal(everything[name], values_only[name])
    assert not torch.equal(everything[name], other_seed[name])
    assert not torch.equal(everything[name], everything[name.replace(".0.", ".1.")])
    # Uniform in +-1/sqrt(32): standard deviation 1/sqrt(3 * 32).
    assert everything[name].abs().max() <= 32**-0.5
    assert everything[name].std().item() == pytest.approx((3 * 32) ** -0.5, rel=0.1)
    assert not everything[name.replace("lora_A", "lora_B")].any()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_loss_and_gradients_equal_peft(family: str, recompute: bool) -> None:
    lora = LoRA(r=4, lora_alpha=6)
    model = adapted(family, lora)
    move_off_zero(model)
    theirs = in_peft(model, lora, family)
    model.train()
    if recompute:
        recompute_layers(model, selective=False)

    expected = plain_loss(theirs, DOCUMENTS)
    expected.backward()
    loss = packed_loss(model, DOCUMENTS, 24)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
    found = {n.removeprefix("base_model.model."): g for n, g in gradients(theirs).items()}
    error, name = largest_difference(gradients(model), found)
    assert error < 2e-5, name


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_neox"])
def test_merged_weights_give_the_adapted_logits(family: str) -> None:
    model = adapted(family, LoRA(r=4))
    move_off_zero(model)
    block = pack(DOCUMENTS, 24)
    merged = PolicyModel.from_hf(tiny_model(family, seed=7))
    missing = merged.load_state_dict(dict(model.hf_tensors(merge=True)))
    assert not missing.missing_keys and not missing.unexpected_keys
    with torch.no_grad():
        adapted_logits, merged_logits = model.logits(block)[:20], merged.logits(block)[:20]
        base_logits = PolicyModel.from_hf(tiny_model(family)).logits(block)[:20]
    torch.testing.assert_close(merged_logits, adapted_logits, rtol=1e-5, atol=1e-5 * adapted_logits.abs().max().item())
    assert (base_logits - adapted_logits).abs().max() > 0.1
    for name, tensor in model.hf_tensors(merge=False):
        assert torch.equal(tensor, tiny_model(family).state_dict()[name]), name


def test_the_head_is_never_adapted() -> None:
    assert not [name for name, _ in adapted("llama", LoRA()).named_parameters() if "lm_head.lora" in name]


def test_fused_experts_are_said_not_to_be_linear() -> None:
    with pytest.raises(ModelError) as caught:
        adapted("qwen3_moe", LoRA(target_modules=["gate_up_proj"]))
    assert "fused experts are not linear layers" in caught.value.cure
