"""Every family of transformers whose plan is accepted computes on two ranks what it computes on one.

A plan is read, not understood: one that forgets a norm's gradient, or mixes heads between its cuts, would train wrongly
and say nothing. So what stands here may be called supported.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from burnish.mesh import open_mesh
from burnish.mesh_config import MeshConfig
from burnish.model.policy_model import PolicyModel
from burnish.model.shards import whole_parameter
from burnish.model.tensor_parallel import apply_tensor_parallel, finish_gradients
from tests.policy_model_helpers import gradients, largest_difference, packed_loss, random_documents
from tests.ranks import run_ranks
from tests.tiny_models import tiny_model

DENSE = [
    "arcee", "cohere", "cohere2", "cwm", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4",
    "gpt_neox", "granite", "granite_swa", "helium", "hyperclovax", "jais2", "llama", "ministral3", "mistral",
    "nanochat", "olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2",
    "vaultgemma",
]  # fmt: skip
MIXTURES = [
    "aria_text", "cohere2_moe", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "granitemoe_swa",
    "hy_v3", "laguna", "mellum", "mimo_v2_flash", "minimax_m2", "minimax_m3_vl_text", "mixtral", "olmoe",
    "qwen2_moe", "qwen3_moe", "solar_open",
]  # fmt: skip
SMALL = {
    "attention_dropout": 0.0,
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "moe_k": 2,
    "moe_num_experts": 4,
    "n_group": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "residual_dropout": 0.0,
    "shared_expert_intermediate_size": 16,
    "sliding_window": 4,
    "topk_group": 1,
}
"""Fields of a configuration, for families that have them."""
DOCUMENTS = random_documents([11, 6, 3], 96)


def build(family: str) -> PolicyModel:
    """In float64, but for mixtures of experts: torch's grouped product knows none."""
    from transformers import AutoConfig

    stock = AutoConfig.for_model(family)
    fields: dict[str, Any] = {name: value for name, value in SMALL.items() if getattr(stock, name, None) is not None}
    if getattr(stock, "layer_types", None):
        fields["layer_types"] = (2 * stock.layer_types)[:2]
    causal_lm = tiny_model(family, **fields)
    return PolicyModel.from_hf(causal_lm if family in MIXTURES else causal_lm.double(), pad_vocab_to=64).train()


def compare(rank: int, folder: str) -> None:
    """For each family the largest relative error of loss and of any gradient."""
    errors = {}
    with open_mesh("cpu", MeshConfig(tp=2)) as mesh:
        for family in DENSE + MIXTURES:
            model = build(family)
            expected = packed_loss(model, DOCUMENTS, 25)
            expected.backward()
            expected_gradients = gradients(model)
            model = build(family)
            model.mesh = mesh
            apply_tensor_parallel(model, mesh)
            loss = packed_loss(model, DOCUMENTS, 25)
            loss.backward()
            finish_gradients(model, mesh)
            found = {name: whole_parameter(model, name, gradient) for name, gradient in gradients(model).items()}
            errors[family] = [abs(loss.item() / expected.item() - 1), *largest_difference(found, expected_gradients)]
        if rank == 0:
            (Path(folder) / "errors.json").write_text(json.dumps(errors))
        mesh.barrier()


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, float, str]]:
    folder = tmp_path_factory.mktemp("families")
    run_ranks(2, compare, str(folder), seconds=600)
    return json.loads((folder / "errors.json").read_text())


@pytest.mark.long
@pytest.mark.parametrize("family", DENSE + MIXTURES)
def test_two_ranks_compute_what_one_does(family: str, errors: dict[str, tuple[float, float, str]]) -> None:
    loss, gradient, name = errors[family]
    assert loss < (1e-6 if family in MIXTURES else 1e-7)
    # Norms, routers and rotary tables that count in float32 round by 1e-7, float32 throughout by up to 2e-5.
    assert gradient < (5e-5 if family in MIXTURES else 1e-6), name
