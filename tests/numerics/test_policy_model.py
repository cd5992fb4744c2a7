"""`PolicyModel` against plain transformers: loss, logits and every gradient, whatever is done to the layers."""

from __future__ import annotations

import copy

import pytest
import torch

from burnish.errors import ModelError
from burnish.mesh import open_mesh
from burnish.model.parallel import fsdp_modules, recompute_layers, shard
from burnish.model.policy_model import PolicyModel, verify_head
from burnish.model.precision import keep_masters
from tests.policy_model_helpers import gradients, largest_difference, pack, packed_loss, plain_loss, random_documents
from tests.tiny_models import FAMILIES, tiny_model

DOCUMENTS = random_documents([11, 6, 3], 96)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_loss_and_every_gradient_equal_plain_transformers(family: str, recompute: str) -> None:
    plain = tiny_model(family)
    model = PolicyModel.from_hf(copy.deepcopy(plain), projection_chunk=5)
    model.train()
    if recompute != "none":
        recompute_layers(model, selective=recompute == "selective")
    expected = plain_loss(plain, DOCUMENTS)
    expected.backward()
    loss = packed_loss(model, DOCUMENTS, 24)
    loss.backward()

    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
    error, name = largest_difference(gradients(model), gradients(plain))
    assert error < 2e-5, name


def test_selective_recomputation_keeps_products_and_recomputes_the_rest() -> None:
    def operators(selective: bool | None) -> dict[str, int]:
        model = PolicyModel.from_hf(tiny_model("llama"))
        if selective is not None:
            recompute_layers(model, selective=selective)
        loss = packed_loss(model, DOCUMENTS, 24)
        counts: dict[str, int] = {}

        class Count(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                counts[func.__name__] = counts.get(func.__name__, 0) + 1
                return func(*args, **(kwargs or {}))

        with Count():
            loss.backward()
        return counts

    stored, selective, full = operators(None), operators(True), operators(False)
    # Two layers of seven products and one attention; the last product's result is not needed to differentiate it.
    assert full["mm.default"] - stored["mm.default"] == 2 * 6
    assert selective["mm.default"] == stored["mm.default"]
    assert full["document_attention.default"] == 2
    assert "document_attention.default" not in selective
    assert selective["rsqrt.default"] == full["rsqrt.default"] > stored.get("rsqrt.default", 0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_padding_the_vocabulary_changes_nothing(family: str, tied: bool) -> None:
    documents = random_documents([11, 6, 3], 131)
    plain = tiny_model(family, vocab_size=131, tie_word_embeddings=tied)
    model = PolicyModel.from_hf(copy.deepcopy(plain), pad_vocab_to=64)
    assert (model.vocab_size, model.head.weight.shape[0], model.is_tied) == (131, 192, tied)
    assert model.causal_lm.get_input_embeddings().weight.shape[0] == (192 if tied else 131)

    expected = plain_loss(plain, documents)
    expected.backward()
    loss = packed_loss(model, documents, 24)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
    ours, theirs = gradients(model), gradients(plain)
    padded = ours.pop("model.embed_tokens.weight" if tied else "lm_head.weight")
    unpadded = theirs.pop("model.embed_tokens.weight" if tied else "lm_head.weight")
    assert not padded[131:].any()
    error, name = largest_difference(ours | {"head": padded[:131]}, theirs | {"head": unpadded})
    assert error < 2e-5, name

    for name, tensor in model.hf_tensors(merge=False):
        assert torch.equal(tensor, plain.state_dict()[name]), name


def test_a_vocabulary_that_is_a_multiple_is_left_alone() -> None:
    plain = tiny_model("llama", vocab_size=128)
    weight = plain.lm_head.weight
    assert PolicyModel.from_hf(plain, pad_vocab_to=64).head.weight is weight


@pytest.mark.parametrize("family", ["cohere", "granite"])
def test_scaled_logits_are_honoured(family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.tiny_models import _COMMON

    scale = {"cohere": {"logit_scale": 0.25}, "granite": {"logits_scaling": 4.0}}[family]
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **_COMMON, **scale), attn_implementation="eager"
    )
    plain.lm_head.weight.data.mul_(50)
    model = PolicyModel.from_hf(copy.deepcopy(plain))
    assert model.logit_scale == 0.25
    torch.testing.assert_close(packed_loss(model, DOCUMENTS, 24), plain_loss(plain, DOCUMENTS), rtol=2e-6, atol=0)
    verify_head(model)


def test_logits_that_are_not_reproduced_are_refused() -> None:
    model = PolicyModel.from_hf(tiny_model("gemma2"))
    verify_head(model)
    model.softcap = None
    with pytest.raises(ModelError, match="does something to its logits that Burnish does not know"):
        verify_head(model)


def test_a_model_without_an_attention_interface_is_refused() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mpt", d_model=32, n_heads=4, n_layers=2, vocab_size=96, max_seq_len=32)
    )
    with pytest.raises(ModelError, match="MptForCausalLM does not take an attention function from outside"):
        PolicyModel.from_hf(plain)


def test_an_encoder_head_is_refused() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "bert",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        vocab_size=96,
        is_decoder=True,
    )
    with pytest.raises(ModelError, match="not a backbone followed by one linear head"):
        PolicyModel(AutoModelForCausalLM.from_config(config))


def test_one_rank_in_float32_stays_plain() -> None:
    model = PolicyModel.from_hf(tiny_model("llama"))
    with open_mesh("cpu") as mesh:
        shard(model, mesh, torch.float32)
    assert fsdp_modules(model) == []


def test_bfloat16_trains_float32_masters_and_leaves_frozen_weights_alone() -> None:
    plain = tiny_model("llama", tie_word_embeddings=True).bfloat16()
    reference = copy.deepcopy(plain).float()
    model = PolicyModel.from_hf(plain)
    model.train()
    for layer in model.layers:
        layer.requires_grad_(False)
    keep_masters(model)
    assert {p.dtype for p in model.layers.parameters()} == {torch.bfloat16}
    with open_mesh("cpu") as mesh:
        shard(model, mesh, torch.bfloat16)
        loss = packed_loss(model, DOCUMENTS, 24)
        loss.backward()
        found = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
        assert {g.dtype for g in found.values()} == {torch.float32}
        assert set(found) == {"model.embed_tokens.weight", "model.norm.weight"}
    expected = plain_loss(reference, DOCUMENTS)
    expected.backward()
    torch.testing.assert_close(loss.float(), expected, rtol=2e-2, atol=0)
    theirs = {name: gradient for name, gradient in gradients(reference).items() if name in found}
    error, name = largest_difference(found, theirs)
    assert error < 0.1, name


def test_a_forward_pass_without_a_backward_leaves_the_masters_in_place() -> None:
    """An optimizer is opened, and a checkpoint taken, behind probes and evaluations."""
    model = PolicyModel.from_hf(tiny_model("llama").bfloat16())
    keep_masters(model)
    with open_mesh("cpu") as mesh:
        shard(model, mesh, torch.bfloat16)
        before = [id(parameter) for _, parameter in model.trainable_parameters()]
        for run in (model.logits, lambda block: model(block, needs=frozenset({"logprobs"}), reads=block.loss_mask)):
            with torch.no_grad():
                run(pack(DOCUMENTS, 24))
            assert [id(parameter) for _, parameter in model.trainable_parameters()] == before
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_coefficients_stay_float32_in_a_bfloat16_model() -> None:
    model = PolicyModel.from_hf(tiny_model("llama").bfloat16())
    keep_masters(model)
    block = pack(DOCUMENTS, 24)
    with open_mesh("cpu") as mesh, torch.no_grad():
        shard(model, mesh, torch.bfloat16)

        def nll(coefficient: float) -> float:
            coefficients = coefficient * block.loss_mask.float()
            needs = frozenset({"weighted_nll"})
            return model(block, needs=needs, reads=block.loss_mask, coefficients=coefficients).weighted_nll.item()

        assert nll(0.3) / nll(1.0) == pytest.approx(0.3, rel=1e-6)  # 0.3 in bfloat16 is 0.30078


def test_logits_are_those_of_each_document_alone() -> None:
    plain = tiny_model("qwen3")
    model = PolicyModel.from_hf(copy.deepcopy(plain), pad_vocab_to=64)
    with torch.no_grad():
        logits = model.logits(pack(DOCUMENTS, 24))
        for start, document in zip((0, 11, 17), DOCUMENTS, strict=True):
            alone = plain(input_ids=torch.tensor([document]), use_cache=False).logits[0]
            torch.testing.assert_close(logits[start : start + len(document)], alone, rtol=0, atol=2e-5)
