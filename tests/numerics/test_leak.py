from __future__ import annotations

import pytest
import torch

from burnish.mesh import open_mesh
from burnish.model.leak import packing_leaks
from burnish.model.parallel import shard
from burnish.model.policy_model import PolicyModel
from tests.tiny_models import FAMILIES, tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_models_do_not_leak(family, dtype):
    assert packing_leaks(PolicyModel.from_hf(tiny_model(family).to(dtype))) is None


@pytest.mark.parametrize(("family", "kind"), [("lfm2", "conv"), ("qwen3_next", "linear_attention")])
def test_state_over_document_borders_is_found_and_named(family, kind):
    reason = packing_leaks(PolicyModel.from_hf(tiny_model(family)))
    assert reason is not None and f"1 of 2 layers are {kind}" in reason


def test_attention_over_the_whole_row_is_found():
    model = PolicyModel.from_hf(tiny_model("llama"))
    forward = model.backbone.forward

    def deaf_to_documents(*, input_ids, documents, **options):
        whole_row = torch.tensor([[0, input_ids.shape[1], 0, 0]])
        return forward(input_ids=input_ids, documents=whole_row, **options)

    model.backbone.forward = deaf_to_documents
    assert "move the next one's logits" in (packing_leaks(model) or "")


def test_a_model_that_does_not_see_a_shared_prompt_is_found():
    model = PolicyModel.from_hf(tiny_model("llama"))
    forward = model.backbone.forward

    def deaf_to_prompts(*, documents, **options):
        alone = torch.cat([documents[:, :2], torch.zeros_like(documents[:, 2:])], 1)
        return forward(documents=alone, **options)

    model.backbone.forward = deaf_to_prompts
    assert "behind a shared prompt" in (packing_leaks(model) or "")


def test_positions_that_do_not_restart_are_found():
    model = PolicyModel.from_hf(tiny_model("gpt2", n_embd=32, n_layer=2, n_head=4))
    assert packing_leaks(model, 100_000) is None  # its table of positions has 256 rows
    forward = model.backbone.forward
    model.backbone.forward = lambda token_ids, *, position_ids, **options: forward(token_ids, **options)
    assert "from its own alone" in (packing_leaks(model) or "")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_a_long_document_that_turns_the_positions_of_its_neighbours_is_found(rope):
    """Trained on 32 positions: up to there every document keeps its own."""
    rope |= {"rope_theta": 10000.0, "original_max_position_embeddings": 32}
    model = PolicyModel.from_hf(tiny_model("llama", max_position_embeddings=32, rope_parameters=rope))
    assert packing_leaks(model, 32) is None
    assert "from its own alone" in (packing_leaks(model, 64) or "")


@pytest.mark.parametrize(("family", "leaks"), [("llama", False), ("qwen3_moe", False), ("lfm2", True)])
def test_a_sharded_model_can_be_asked(family, leaks):
    """Low precision wraps the model for FSDP, on one rank too: only calls through its root see whole parameters."""
    model = PolicyModel.from_hf(tiny_model(family))
    with open_mesh("cpu") as mesh:
        shard(model, mesh, torch.bfloat16)
        assert (packing_leaks(model) is not None) == leaks


def test_the_probe_leaves_the_model_as_it_was():
    model = PolicyModel.from_hf(tiny_model("qwen3_moe")).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert packing_leaks(model) is None
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.causal_lm.get_input_embeddings()._forward_hooks
