"""Two ranks that hold half of the model each compute what one rank does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from burnish.mesh import open_mesh
from burnish.model.adapters.lora import LoRA
from burnish.model.heads.attach import attach
from burnish.model.heads.multi import Multi
from burnish.model.parallel import fsdp_modules, recompute_layers, shard
from burnish.model.policy_model import PolicyModel
from burnish.model.precision import keep_masters
from burnish.model.shards import whole
from tests.policy_model_helpers import largest_difference, pack, random_documents
from tests.ranks import run_ranks
from tests.tiny_models import tiny_model

ROWS = [random_documents([11, 6, 3], 100, seed=0), random_documents([13, 9], 100, seed=1)]
CASES = {
    "full, tied, padded head": ("gemma2", None, "float32"),
    "full": ("llama", None, "float32"),
    "lora": ("llama", LoRA(r=4), "float32"),
    "lora, bfloat16": ("llama", LoRA(r=4), "bfloat16"),
    "dora, adapted head and embedding": (
        "gemma2",
        LoRA(r=4, use_dora=True, target_modules=["q_proj", "lm_head", "embed_tokens"], modules_to_save=["norm"]),
        "float32",
    ),
    "scores": ("llama", None, "float32"),
    "scores beside lora, bfloat16": ("llama", LoRA(r=4), "bfloat16"),
    "mixture of experts": ("qwen3_moe", None, "float32"),
    "tied weight trained beside dora": ("gemma2", LoRA(r=4, use_dora=True, modules_to_save=["lm_head"]), "float32"),
}


def build(case: str) -> PolicyModel:
    family, lora, dtype = CASES[case]
    model = PolicyModel.from_hf(tiny_model(family, vocab_size=100).to(getattr(torch, dtype)), pad_vocab_to=64)
    if lora is not None:
        lora.apply(model, seed=0)
        with torch.no_grad():
            for name, parameter in model.trainable_parameters():
                parameter.fill_(0.02) if "lora_B" in name else None
    if "scores" in case:
        attach(model, Multi.model_validate({"heads": {"lm": {"type": "lm"}, "grade": {"type": "scalar"}}}), seed=0)
    keep_masters(model)
    model.train()
    recompute_layers(model, selective=True)
    return model


def step(model: PolicyModel, rows: list[list[list[int]]]) -> float:
    """Summed loss of `rows`, their gradients accumulated: what a policy does with its micro-batches."""
    total = 0.0
    for documents in rows:
        block = pack(documents, 24)
        coefficients = block.loss_mask.float() / 37  # 37 trained tokens over all ranks
        needs = frozenset({"weighted_nll", "scores"} if model.heads else {"weighted_nll"})
        outputs = model(block, needs=needs, reads=block.loss_mask, coefficients=coefficients)
        assert outputs.weighted_nll is not None
        loss = outputs.weighted_nll + sum(scores.sum() / 37 for scores in outputs.scores.values())
        loss.backward()
        total += loss.item()
    return total


def one_of_two(rank: int, folder: str) -> None:
    """A rank's process: shards the model, takes its row, and rank 0 writes down what came out."""
    with open_mesh("cpu") as mesh:
        for index, case in enumerate(CASES):
            model = build(case)
            shard(model, mesh, getattr(torch, CASES[case][2]))
            assert len(fsdp_modules(model)) == 3 + len(model.heads)
            (loss,) = mesh.sum_scalars([step(model, ROWS[rank : rank + 1])])
            found = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
            exported = {name: tensor.clone() for name, tensor in model.hf_tensors(merge=True)} | model.head_tensors()
            if rank == 0:
                torch.save((loss, found, exported), Path(folder) / f"{index}.pt")
        mesh.barrier()


@pytest.fixture(scope="module")
def two_ranks(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[float, dict[str, Tensor], dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("two-ranks")
    run_ranks(2, one_of_two, str(folder))
    return {case: torch.load(folder / f"{index}.pt") for index, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES)
def test_loss_gradients_and_export_are_those_of_one_rank(case: str, two_ranks: dict) -> None:
    loss, found, exported = two_ranks[case]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the ranks: another number cuts the sums of a product in another way
    model = build(case)
    expected = step(model, ROWS)
    torch.set_num_threads(threads)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    exact = CASES[case][2] == "float32"
    assert loss == pytest.approx(expected, rel=1e-6 if exact else 1e-2)
    error, name = largest_difference(found, gradients)
    assert error < (1e-6 if exact else 0.1), name
    whole_model = dict(model.hf_tensors(merge=True)) | model.head_tensors()
    assert exported.keys() == whole_model.keys()
    for name, tensor in whole_model.items():
        assert torch.equal(exported[name], tensor), name
