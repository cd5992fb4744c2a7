"""rsLoRA, DoRA, adapters of embeddings and heads, modules trained in full: beside PEFT, merged, switched off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from burnish.model.adapters.lora import LoRA
from burnish.model.adapters.weights import adapted_weight
from burnish.model.export import write_model
from burnish.model.policy_model import PolicyModel
from tests.lora_helpers import VARIANTS, adapted, gradients_without_padding, in_peft, move_off_zero
from tests.policy_model_helpers import gradients, largest_difference, pack, packed_loss, plain_loss, random_documents
from tests.tiny_models import tiny_model

DOCUMENTS = random_documents([11, 6, 3], 96)
BLOCK = pack(DOCUMENTS, 24)


def logprobs(model: PolicyModel) -> Tensor:
    with torch.no_grad():
        return model(BLOCK, needs=frozenset({"logprobs"}), reads=BLOCK.loss_mask).logprobs


def logits(model: PolicyModel) -> Tensor:
    with torch.no_grad():
        return model.logits(BLOCK)[:20]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_base_computes_the_same_before_the_first_step_and_with_the_adapter_off(variant: str, tied: bool) -> None:
    base = PolicyModel.from_hf(tiny_model("gemma2", tie_word_embeddings=tied), pad_vocab_to=64)
    model = adapted("gemma2", VARIANTS[variant], pad_vocab_to=64, tie_word_embeddings=tied)
    assert torch.equal(logprobs(model), logprobs(base)) and torch.equal(logits(model), logits(base))
    move_off_zero(model)
    trained = [name for name, _ in model.trainable_parameters()]
    moved = logprobs(model)
    assert (moved - logprobs(base)).abs().max() > 0.1
    with VARIANTS[variant].off(model):
        assert torch.equal(logprobs(model), logprobs(base)) and torch.equal(logits(model), logits(base))
        assert [name for name, _ in model.trainable_parameters()] == trained
    assert torch.equal(logprobs(model), moved)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_gradients_and_logits_equal_peft(variant: str, tied: bool) -> None:
    lora, family = VARIANTS[variant], "gemma3"
    model = adapted(family, lora, pad_vocab_to=64, tie_word_embeddings=tied)
    move_off_zero(model)
    theirs = in_peft(model, lora, family, tie_word_embeddings=tied)
    expected = plain_loss(theirs, DOCUMENTS)
    expected.backward()
    found = {name.removeprefix("base_model.model."): g for name, g in gradients(theirs).items()}
    if tied and any("embed_tokens.modules_to_save" in name for name in found):
        # PEFT trains two copies of the one weight; ours stays one, whose gradient is the sum of theirs.
        found["model.embed_tokens.modules_to_save.default.weight"] += found.pop(
            "lm_head.modules_to_save.default.weight"
        )
    model.train()
    loss = packed_loss(model, DOCUMENTS, 24)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
    error, name = largest_difference(gradients_without_padding(model), found)
    assert error < 2e-5, name
    with torch.no_grad():
        theirs_logits = theirs(input_ids=torch.tensor([DOCUMENTS[0]])).logits[0]
    torch.testing.assert_close(logits(model.eval())[:11], theirs_logits, rtol=0, atol=3e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_merged_folder_gives_the_adapted_logits(variant: str, tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = adapted("llama", VARIANTS[variant], pad_vocab_to=64, tie_word_embeddings=tied)
    move_off_zero(model)
    with torch.no_grad():
        write_model(model, tmp_path)
        reread: Any = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
        ours, merged = logits(model)[:11], reread(input_ids=torch.tensor([DOCUMENTS[0]])).logits[0]
    torch.testing.assert_close(merged, ours, rtol=0, atol=5e-6 * ours.abs().max().item())
    # An adapter on one of the two, or on each, unties them; a weight that is trained in full stays one.
    one_sided = "embedding and head" in variant
    assert reread.config.tie_word_embeddings == (tied and not one_sided)
    before = tiny_model("llama", tie_word_embeddings=tied).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.hf_tensors(merge=False))


@pytest.mark.parametrize("side", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_side_of_a_tied_pair_leaves_the_other(side: str) -> None:
    lora = LoRA(r=4, target_modules=["q_proj", side])
    model = adapted("llama", lora, tie_word_embeddings=True)
    assert not model.is_tied
    move_off_zero(model)
    merged = dict(model.hf_tensors(merge=True))
    original = tiny_model("llama", tie_word_embeddings=True).lm_head.weight
    head, embedding = merged["lm_head.weight"], merged["model.embed_tokens.weight"]
    changed, kept = (embedding, head) if side == "embed_tokens" else (head, embedding)
    assert torch.equal(kept, original) and not torch.equal(changed, original)


@pytest.mark.parametrize("side", ["embed_tokens", "lm_head"])
def test_saving_one_side_of_a_tied_pair_trains_one_weight(side: str) -> None:
    model = adapted("llama", LoRA(r=4, target_modules=["q_proj"], modules_to_save=[side]), tie_word_embeddings=True)
    trained = [name for name, _ in model.trainable_parameters() if "lora_" not in name]
    assert trained == ["model.embed_tokens.modules_to_save.default.weight"] and model.is_tied


@pytest.mark.parametrize("lora", [LoRA(r=4), LoRA(r=4, use_dora=True, target_modules=["c_attn", "wte", "lm_head"])])
def test_transposed_layers(lora: LoRA) -> None:
    """GPT-2 keeps its weights as [inputs, outputs]."""
    sizes: dict[str, Any] = {"n_inner": 48, "n_positions": 64, "tie_word_embeddings": False}
    base = logits(PolicyModel.from_hf(tiny_model("gpt2", **sizes)))
    model = adapted("gpt2", lora, **sizes)
    assert torch.equal(logits(model), base)
    move_off_zero(model)
    merged = PolicyModel.from_hf(tiny_model("gpt2", seed=7, **sizes))
    merged.load_state_dict(dict(model.hf_tensors(merge=True)))
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=3e-5)
    assert (logits(model) - base).abs().max() > 0.1
    with lora.off(model):
        assert torch.equal(logits(model), base)


def test_the_weight_of_an_adapted_layer_by_hand() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    def layer(**config: Any) -> Any:
        plain = nn.Sequential(nn.Linear(2, 2, bias=False))
        plain[0].weight.data = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        inject_adapter_in_model(LoraConfig(target_modules=["0"], **config), plain)
        for values in (plain[0].lora_A, plain[0].lora_B):
            nn.init.zeros_(values["default"].weight)
        plain[0].lora_A["default"].weight.data[0] = torch.tensor([0.0, 2.0])
        plain[0].lora_B["default"].weight.data[:, 0] = torch.tensor([1.0, 0.0])
        return plain[0]

    # B A = [[0, 2], [0, 0]]. LoRA: scale 8 / 4 = 2. rsLoRA: 8 / sqrt(4) = 4.
    assert adapted_weight(layer(r=4, lora_alpha=8)).tolist() == [[3, 4], [0, 1]]
    assert adapted_weight(layer(r=4, lora_alpha=8, use_rslora=True)).tolist() == [[3, 8], [0, 1]]
    # DoRA: the rows [3, 4] and [0, 1] have norms 5 and 1, those of W, 3 and 1, are the magnitudes: [3, 4] * 3 / 5.
    dora = adapted_weight(layer(r=4, lora_alpha=8, use_dora=True))
    torch.testing.assert_close(dora, torch.tensor([[1.8, 2.4], [0, 1]]))


def test_rounded_weights_start_where_the_base_is() -> None:
    """A magnitude is the norm that the forward pass divides by, in bfloat16 too, where its float32 value is not."""
    base = PolicyModel.from_hf(tiny_model("llama").bfloat16())
    model = PolicyModel.from_hf(tiny_model("llama").bfloat16())
    lora = LoRA(r=4, use_dora=True, target_modules=["q_proj", "down_proj", "lm_head"])
    lora.apply(model, seed=0)
    magnitude = dict(model.trainable_parameters())["lm_head.lora_magnitude_vector.default.weight"]
    assert magnitude.dtype == torch.float32 and not torch.equal(magnitude, magnitude.bfloat16().float())
    assert torch.equal(logprobs(model), logprobs(base)) and torch.equal(logits(model), logits(base))
