"""Packed rows under our attention against plain transformers, one document at a time, in logits and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from burnish.errors import ModelError
from burnish.model.attention import register
from tests.attention_helpers import layout, side_by_side
from tests.tiny_models import FAMILIES, VOCAB_SIZE, tiny_model

register()

LENGTHS = (7, 12, 1, 5)
ROW_LENGTH = 28
TOLERANCE = 1e-5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def weights(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def logits(model, token_ids: Tensor, documents: Tensor | None = None) -> Tensor:
    """[T, V]; positions restart with each document and go on after a shared prefix."""
    if documents is None:
        return model(token_ids.unsqueeze(0)).logits[0]
    positions = torch.zeros_like(token_ids)
    for start, end, prefix_start, prefix_end in documents.tolist():
        positions[start:end] = torch.arange(end - start) + prefix_end - prefix_start
    return model(token_ids.unsqueeze(0), position_ids=positions.unsqueeze(0), documents=documents).logits[0]


def gradients(model, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same(ours: Tensor, theirs: Tensor, what: str) -> None:
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error <= TOLERANCE, f"{what}: off by {error:.1e} of the largest value"


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_one_document_at_a_time(family):
    plain, ours = tiny_model(family), tiny_model(family, attn_implementation="burnish")
    token_ids, used = draw(ROW_LENGTH), sum(LENGTHS)
    packed = logits(ours, token_ids, side_by_side(*LENGTHS))[:used]
    alone = torch.cat([logits(plain, document) for document in token_ids[:used].split(LENGTHS)])
    assert_same(packed, alone, "logits")
    towards = weights(used, VOCAB_SIZE)
    expected = gradients(plain, (alone * towards).sum())
    for name, gradient in gradients(ours, (packed * towards).sum()).items():
        assert expected[name].abs().max() > 0, f"{name} is not exercised"
        assert_same(gradient, expected[name], name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prompt_equals_repeating_it(family):
    """Prompt of 6 with completions of 5 and 8: once in the row, or in front of each completion."""
    model = tiny_model(family, attn_implementation="burnish")
    prompt, chosen, rejected = draw(6, seed=2), draw(5, seed=3), draw(8, seed=4)
    shared = logits(model, torch.cat([prompt, chosen, rejected]), layout((0, 6, 0, 0), (6, 11, 0, 6), (11, 19, 0, 6)))
    repeated = logits(model, torch.cat([prompt, chosen, prompt, rejected]), side_by_side(11, 14))
    repeated = torch.cat([repeated[:11], repeated[17:]])
    assert_same(shared, repeated, "logits")
    towards = weights(19, VOCAB_SIZE)
    expected = gradients(model, (repeated * towards).sum())
    for name, gradient in gradients(model, (shared * towards).sum()).items():
        assert_same(gradient, expected[name], name)


@pytest.mark.parametrize("family", [family for family in FAMILIES if "moe" not in family and family != "gpt_oss"])
def test_another_document_leaves_logits_bit_identical(family):
    """Mixtures of experts are left out: they batch tokens by expert, so rounding depends on the other tokens."""
    model = tiny_model(family, attn_implementation="burnish")
    token_ids, other = draw(ROW_LENGTH), draw(ROW_LENGTH, seed=9)
    other[7:19] = token_ids[7:19]
    before, after = (logits(model, tokens, side_by_side(*LENGTHS)) for tokens in (token_ids, other))
    assert torch.equal(before[7:19], after[7:19])
    assert not torch.equal(before[:7], after[:7])


def test_a_compiled_backbone_has_one_graph_for_all_layouts():
    model = tiny_model("gemma2", attn_implementation="burnish")
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model.model, fullgraph=True, backend="aot_eager")
    token_ids, positions = draw(1, ROW_LENGTH), torch.arange(ROW_LENGTH).unsqueeze(0)
    for documents in (side_by_side(ROW_LENGTH), side_by_side(*LENGTHS), layout((0, 6, 0, 0), (6, 11, 0, 6))):
        plain, made = (
            backbone(token_ids, position_ids=positions, documents=documents).last_hidden_state
            for backbone in (model.model, compiled)
        )
        assert_same(made, plain, "hidden states")
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("family", "without"),
    [
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"sliding_window": 100}),
        ("gemma3", {"sliding_window": 100}),
        ("gpt_oss", {"sliding_window": 100}),
        ("gpt_oss", {"sinks": -1e4}),
    ],
    ids=str,
)
def test_the_tiny_models_would_show_what_is_ignored(family, without):
    """The parity above proves something only if leaving out a cap, a window or the sinks moves the logits."""
    sinks = without.pop("sinks", None)
    changed = tiny_model(family, **without)
    if sinks is not None:
        for layer in changed.model.layers:
            layer.self_attn.sinks.data.fill_(sinks)
    token_ids = draw(12)
    before, after = logits(tiny_model(family), token_ids), logits(changed, token_ids)
    assert (before - after).abs().max() > 0.02 * before.abs().max()


def test_values_narrower_than_keys():
    """Multi-head latent attention (DeepSeek-V3): keys of 12, values of 8."""
    family = {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 2,
    }
    plain, ours = (tiny_model("deepseek_v3", attn_implementation=name, **family) for name in ("eager", "burnish"))
    token_ids = draw(19)
    packed = logits(ours, token_ids, side_by_side(7, 12))
    assert_same(packed, torch.cat([logits(plain, document) for document in token_ids.split((7, 12))]), "logits")


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("phimoe", {"num_local_experts": 2, "sliding_window": 4}, "neither causal nor a window that it states"),
        ("llama4_text", {"num_local_experts": 2, "attention_chunk_size": 4}, "neither causal nor a window"),
        ("gemma3", {"use_bidirectional_attention": True}, "not causal"),
        ("llama", {"attention_dropout": 0.1}, "dropout"),
    ],
)
def test_attention_that_the_operator_cannot_honour_is_refused(family, options, reason):
    model = tiny_model(family, attn_implementation="burnish", **options).train()
    with pytest.raises(ModelError, match=reason):
        logits(model, draw(ROW_LENGTH), side_by_side(*LENGTHS))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "no document layout reached this layer"),
        ({"attention_mask": torch.ones(1, 28)}, "padding mask"),
        ({"documents": side_by_side(*LENGTHS), "input_ids": draw(2, ROW_LENGTH)}, "batch of one"),
    ],
)
def test_calls_that_the_operator_cannot_honour_are_refused(options, reason):
    model = tiny_model("llama", attn_implementation="burnish")
    with pytest.raises(ModelError, match=reason):
        model(**{"input_ids": draw(1, ROW_LENGTH), **options})
