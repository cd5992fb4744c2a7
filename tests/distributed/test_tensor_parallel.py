"""Ranks that share heads, features and vocabulary compute what one rank with the whole model does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from burnish.errors import ModelError
from burnish.mesh import Mesh, open_mesh
from burnish.mesh_config import MeshConfig, Sizes
from burnish.model.adapters.lora import LoRA
from burnish.model.config import ModelConfig
from burnish.model.heads.attach import attach
from burnish.model.heads.multi import Multi
from burnish.model.parallel import prepare, recompute_layers, shard
from burnish.model.policy_model import PolicyModel
from burnish.model.shards import whole_parameter
from burnish.model.tensor_parallel import apply_tensor_parallel, cut, finish_gradients
from burnish.model.tensor_plan import require_divisible
from burnish.model.vocabulary import train_rows
from burnish.types import NewTokens
from tests.policy_model_helpers import largest_difference, pack, random_documents
from tests.ranks import run_ranks
from tests.tiny_models import tiny_config, tiny_model

ROWS = [random_documents([11, 6, 3], 100, seed=0), random_documents([13, 9], 100, seed=1)]
ROW = 25
"""Odd: two ranks pad it."""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "norms of queries and keys": ("qwen3", {"recompute": "full"}),
    "tied, padded head, soft caps, windows": ("gemma2", {}),
    "one matrix for queries, keys and values, biases": ("gpt_neox", {"recompute": "selective"}),
    "whole between the cuts": ("phi3", {}),
    "mixture of experts": ("qwen3_moe", {}),
    "lora": ("llama", {"lora": LoRA(r=4), "recompute": "selective"}),
    "lora, biases": ("gpt_neox", {"lora": LoRA(r=4)}),
    "lora, tied head and embedding, whole modules": (
        "gemma2",
        {"lora": LoRA(r=4, target_modules=["o_proj", "lm_head", "embed_tokens"], modules_to_save=["norm", "up_proj"])},
    ),
    "lora, embedding in full": ("gemma2", {"lora": LoRA(r=4, modules_to_save=["embed_tokens"])}),
    "dropout": ("llama", {"lora": LoRA(r=4, lora_dropout=0.5, target_modules=["q_proj", "up_proj"]), "row": 24}),
    "new rows": ("llama", {"new_rows": True}),
    "new rows, tied": ("gemma2", {"new_rows": True}),
    "scores": ("llama", {"scores": True}),
    "sharded": ("qwen3", {"sharded": True, "recompute": "full"}),
    "sharded, tied": ("gemma2", {"sharded": True}),
    "sharded, lora, scores": ("llama", {"sharded": True, "lora": LoRA(r=4), "scores": True, "recompute": "selective"}),
    "sharded mixture of experts": ("qwen3_moe", {"sharded": True}),
}


def build(case: str) -> PolicyModel:
    """In float64, so that only the float32 of FSDP's reductions, Gemma's norms and the adapters' merges rounds."""
    family, options = CASES[case]
    causal_lm = tiny_model(family, vocab_size=100).double()
    if family == "qwen3_moe":
        causal_lm.set_experts_implementation("eager")  # torch's grouped product knows no float64
    model = PolicyModel.from_hf(causal_lm, pad_vocab_to=64)
    if "lora" in options:
        options["lora"].apply(model, seed=0)
    if "new_rows" in options:  # of 128 rows two ranks have 64 each: two of the new ones lie on either
        train_rows(model, NewTokens(first=62, sources=((),) * 4))
    if "scores" in options:
        attach(model, Multi.model_validate({"heads": {"lm": {"type": "lm"}, "grade": {"type": "scalar"}}}), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.trainable_parameters():
            if "lora_" in name and not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    if "new_rows" not in options:
        model.double()
    return model.train()


def step(model: PolicyModel, rows: list[list[list[int]]], length: int) -> float:
    """Summed loss of `rows`, their gradients accumulated: what a policy does with its micro-batches."""
    torch.manual_seed(0)
    total = 0.0
    for documents in rows:
        block = pack(documents, length)
        needs = {"weighted_nll", "entropy", "hidden_states"} | ({"scores"} if model.heads else set())
        coefficients = block.loss_mask.double() / 37
        outputs = model(block, needs=frozenset(needs), reads=block.loss_mask, coefficients=coefficients)
        assert outputs.entropy is not None and outputs.hidden_states is not None
        loss = outputs.weighted_nll + outputs.entropy.sum() / 37 + outputs.hidden_states.pow(2).mean()
        loss = loss + sum(scores.sum() / 37 for scores in outputs.scores.values())
        loss.backward()
        total += loss.item()
    return total


def one_of_four(rank: int, folder: str) -> None:
    """A rank of two groups of two: a case that is not sharded is the same in both groups."""
    with open_mesh("cpu", MeshConfig(tp=2)) as mesh:
        found: dict[str, Any] = {}
        for case, (_, options) in CASES.items():
            model, rows = build(case), ROWS
            apply_tensor_parallel(model, mesh)
            model.mesh = mesh
            if "recompute" in options:
                recompute_layers(model, selective=options["recompute"] == "selective")
            if "sharded" in options:
                shard(model, mesh, torch.float64)
                rows = ROWS[mesh.data_rank :: 2]
            loss = step(model, rows, options.get("row", ROW))
            loss = mesh.sum_scalars([loss])[0] if "sharded" in options else loss
            finish_gradients(model, mesh)
            gradients = {
                n: whole_parameter(model, n, p.grad) for n, p in model.named_parameters() if p.grad is not None
            }
            logits = model.eval().logits(pack(ROWS[0], ROW)).detach()
            exported = {name: tensor.clone() for name, tensor in model.hf_tensors(merge=True)}
            found[case] = loss, gradients, logits, exported
        found["absent gradients"] = absent_gradients(mesh)
        found["refusals"] = refusals(mesh)
        if rank == 0:
            torch.save(found, Path(folder) / "found.pt")
        mesh.barrier()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For matrices of 32 columns a second one only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("four-ranks")
    run_ranks(4, one_of_four, str(folder))
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("case", CASES)
def test_loss_gradients_logits_and_export_are_those_of_one_rank(case: str, four_ranks: dict[str, Any]) -> None:
    loss, found, logits, exported = four_ranks[case]
    model = build(case)
    expected = step(model, ROWS, CASES[case][1].get("row", ROW))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert loss == pytest.approx(expected, rel=1e-9)
    error, name = largest_difference(found, gradients)
    assert error < 1e-6, name
    torch.testing.assert_close(logits, model.eval().logits(pack(ROWS[0], ROW)).detach(), rtol=1e-6, atol=1e-6)
    whole_model = dict(model.hf_tensors(merge=True))
    assert exported.keys() == whole_model.keys()
    for name, tensor in whole_model.items():
        torch.testing.assert_close(exported[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def absent_gradients(mesh: Mesh) -> tuple[Any, ...]:
    """What becomes of a gradient that only the second rank has, of one that no rank has, and of a complete one."""
    model = build("llama")
    apply_tensor_parallel(model, mesh)
    names = ("model.layers.0.input_layernorm.weight", "model.norm.weight", "lm_head.weight")
    of_one, of_none, complete = (model.get_parameter(name) for name in names)
    if mesh.axis_rank("tp") == 1:
        of_one.grad = torch.full_like(of_one, 3.0)
    complete.grad = torch.ones_like(complete)
    finish_gradients(model, mesh)
    return of_one.grad, of_none.grad, complete.grad


def test_a_gradient_that_one_rank_has_reaches_all_and_one_that_none_has_stays_absent(
    four_ranks: dict[str, Any],
) -> None:
    of_one, of_none, complete = four_ranks["absent gradients"]
    assert torch.equal(of_one, torch.full((32,), 3.0, dtype=torch.float64))
    assert of_none is None
    assert torch.equal(complete, torch.ones(64, 32, dtype=torch.float64))


def refusals(mesh: Mesh) -> dict[str, str]:
    """What a model that cannot be cut is told."""
    said = {}
    for what, config in {
        "compiled": ModelConfig.model_validate({"path": "here", "compile": {}}),
        "dora": ModelConfig.model_validate({"path": "here", "adapter": {"type": "lora", "r": 4, "use_dora": True}}),
    }.items():
        with pytest.raises(ModelError) as error:
            prepare(PolicyModel.from_hf(tiny_model("llama")), config, mesh, seed=0)
        said[what] = str(error.value)
    return said


def test_what_does_not_go_together_is_refused(four_ranks: dict[str, Any]) -> None:
    assert "torch.compile cannot take the exchanges" in four_ranks["refusals"]["compiled"]
    assert "'lora_magnitude_vector' in model.layers.0.self_attn.q_proj" in four_ranks["refusals"]["dora"]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_parts_of_all_ranks_are_the_whole_and_meta_stays_meta(family: str) -> None:
    whole = dict(PolicyModel.from_hf(tiny_model(family), pad_vocab_to=64).named_parameters())
    models = [PolicyModel.from_hf(tiny_model(family), pad_vocab_to=64) for _ in range(2)]
    for rank, model in enumerate(models):
        cut(model, 2, rank)
        with torch.device("meta"):
            on_meta = PolicyModel.from_hf(AutoModelForCausalLM.from_config(tiny_config(family)), pad_vocab_to=64)
        cut(on_meta, 2, rank)
        assert {name: p.shape for name, p in on_meta.named_parameters() if p.is_meta} == {
            name: p.shape for name, p in model.named_parameters()
        }
        assert model.is_tied == on_meta.is_tied == (family == "gemma2")
    parts, dims, partial = [dict(m.named_parameters()) for m in models], models[0].tp_dims, models[0].tp_partial
    assert parts[0].keys() == whole.keys()
    for name, tensor in whole.items():
        pieces = [part[name] for part in parts]
        assert torch.equal(torch.cat(tuple(pieces), dims[name]) if name in dims else pieces[0], tensor), name
        assert (name in dims) != (name in partial), name
    assert sum(p.numel() for p in parts[0].values()) < 0.51 * sum(p.numel() for p in whole.values())


def sizes(tp: int) -> Sizes:
    return Sizes(1, 1, 1, tp)


def test_a_configuration_says_what_cannot_be_shared_evenly() -> None:
    config = tiny_config("llama", vocab_size=100, hidden_size=48, num_attention_heads=12, num_key_value_heads=4)
    for tp in (1, 2, 4):
        require_divisible(config, 128, sizes(tp))
    with pytest.raises(
        ModelError, match=r"num_key_value_heads 4 cannot be shared evenly by 3 ranks(.|\n)*`tp: 2 or 4`"
    ):
        require_divisible(config, 96, sizes(3))
    with pytest.raises(ModelError, match=r"num_attention_heads 12 and num_key_value_heads 4 .*8 ranks(.|\n)*`tp: 4`"):
        require_divisible(config, 128, sizes(8))
    with pytest.raises(ModelError, match=r"4 ranks cannot have as many of the head's 98 rows(.|\n)*pad_vocab_to: 64"):
        require_divisible(config, 98, sizes(4))
    with pytest.raises(ModelError, match=r"head's 256 rows 100 stand for tokens, and the last of 2 ranks has none"):
        require_divisible(config, 256, sizes(2))


def test_families_that_cannot_be_cut_are_refused() -> None:
    plan_less = tiny_model("gpt_oss")
    with pytest.raises(ModelError, match="GptOssForCausalLM brings no tensor-parallel plan"):
        cut(PolicyModel.from_hf(plan_less), 2, 0)
    with pytest.raises(ModelError, match="gpt_oss brings no tensor-parallel plan"):
        require_divisible(plan_less.config, 128, sizes(2))
    latent = tiny_config("deepseek_v2")
    with pytest.raises(ModelError, match="kv_a_proj_with_mqa by 'mla_kv_a_proj', which is not known"):
        require_divisible(latent, 128, sizes(2))
    with pytest.raises(ModelError, match="does not cut model.layers.0.linear_attn by outputs and then by inputs"):
        cut(PolicyModel.from_hf(tiny_model("qwen3_next")), 2, 0)
    with pytest.raises(
        ModelError, match=r"lm_head.weight has 96 rows, which 5 ranks|q_proj.weight has 32 rows, which 5"
    ):
        cut(PolicyModel.from_hf(tiny_model("llama")), 5, 0)


def test_a_part_that_no_plan_mentions_is_refused() -> None:
    model = PolicyModel.from_hf(tiny_model("qwen3"))
    plan = model.causal_lm._tp_plan
    for name in [name for name in plan if "k_norm" in name]:
        del plan[name]
    with pytest.raises(ModelError, match="does not say what becomes of model.layers.0.self_attn.k_norm.weight"):
        cut(model, 2, 0)
    model = PolicyModel.from_hf(tiny_model("llama"))
    model.layers[1].mixer = torch.nn.Linear(32, 32)
    with pytest.raises(ModelError, match="does not say what becomes of model.layers.1.mixer.weight"):
        cut(model, 2, 0)
