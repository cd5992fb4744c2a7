"""Ranks that have a part of every row's tokens each compute what one rank computes of whole rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from burnish.errors import ModelError
from burnish.losses.nll import NLL
from burnish.losses.reduce import by_document
from burnish.mesh import Mesh, open_mesh
from burnish.mesh_config import MeshConfig
from burnish.model.adapters.lora import LoRA
from burnish.model.context_parallel import verify_cut
from burnish.model.heads.attach import attach
from burnish.model.heads.scalar import Scalar
from burnish.model.parallel import recompute_layers, shard
from burnish.model.policy_model import PolicyModel
from burnish.model.shards import whole_parameter
from burnish.model.tensor_parallel import apply_tensor_parallel, finish_gradients
from burnish.policy.throughput import Throughput
from burnish.types import Block
from tests.policy_model_helpers import largest_difference, pack, random_documents
from tests.ranks import free_port, run_ranks
from tests.tiny_models import tiny_model

ROW = 24
LENGTHS = [[11, 6, 3], [13, 9], [10], [24]]
"""Four ranks cut at 6, 12 and 18, two at 12: over documents and padding; two of four ranks have nothing of [10]."""
ROWS = [random_documents(lengths, 96, seed=seed) for seed, lengths in enumerate(LENGTHS)]
MESHES = {
    "cp 4": MeshConfig(cp=4),
    "dp_shard 2, cp 2": MeshConfig(dp_shard=2, cp=2),
    "tp 2, cp 2": MeshConfig(tp=2, cp=2),
}
CASES: dict[str, tuple[str, str, str | None]] = {
    "llama": ("llama", "cp 4", None),
    "window and soft cap": ("gemma2", "cp 4", None),
    "window, layers recomputed": ("gemma3", "cp 4", "full"),
    "sinks, experts": ("gpt_oss", "cp 4", None),
    "lora, layers recomputed in part": ("qwen3", "dp_shard 2, cp 2", "selective"),
    "window and soft cap, sharded": ("gemma2", "dp_shard 2, cp 2", "full"),
    "beside tensor parallel": ("qwen3", "tp 2, cp 2", "full"),
}


def build(case: str) -> PolicyModel:
    """In float64, so that nothing but the float32 of FSDP's reductions rounds."""
    family, _, recomputed = CASES[case]
    causal_lm = tiny_model(family).double()
    if family == "gpt_oss":
        causal_lm.set_experts_implementation("eager")  # torch's grouped product knows no float64
    model = PolicyModel.from_hf(causal_lm, pad_vocab_to=64)
    if "lora" in case:
        LoRA(r=4).apply(model, seed=0)
        with torch.no_grad():
            for name, parameter in model.trainable_parameters():
                parameter.fill_(0.02) if "lora_B" in name else None
    model.double().train()
    if recomputed is not None:
        recompute_layers(model, selective=recomputed == "selective")
    return model


def loss_of(model: PolicyModel, block: Block) -> Tensor:
    """A little of everything that losses do: a sum of tokens, a curve over whole documents, entropies, states."""
    needs = frozenset({"weighted_nll", "logprobs", "entropy", "hidden_states"})
    outputs = model(block, needs=needs, reads=block.loss_mask, coefficients=block.loss_mask.double() / 37)
    assert outputs.logprobs is not None and outputs.entropy is not None and outputs.hidden_states is not None
    curve = logsigmoid(by_document(outputs.logprobs, block) / 20).sum()
    return outputs.weighted_nll - curve / 7 + outputs.entropy.sum() / 37 + outputs.hidden_states.pow(2).mean()


def step(model: PolicyModel, rows: list[list[list[int]]]) -> tuple[float, dict[str, Tensor]]:
    """Summed loss of `rows` and the gradient of every parameter, added up over them."""
    total = 0.0
    for documents in rows:
        loss = loss_of(model, pack(documents, ROW))
        loss.backward()
        total += loss.item()
    if model.mesh is not None:
        finish_gradients(model, model.mesh)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return total, {name: whole_parameter(model, name, gradient) for name, gradient in gradients.items()}


def one_of_four(rank: int, ports: list[int], folder: str) -> None:
    """A rank: every case on its mesh; rank 0 writes down what came out."""
    for port, (mesh_name, config) in zip(ports, MESHES.items(), strict=True):
        os.environ["MASTER_PORT"] = str(port)  # its own: ranks that still leave a group and ranks that join one mix
        with open_mesh("cpu", config) as mesh:
            for index, (case, (_, wanted, _)) in enumerate(CASES.items()):
                if wanted != mesh_name:
                    continue
                model = build(case)
                apply_tensor_parallel(model, mesh)
                shard(model, mesh, torch.float64)
                verify_cut(model)
                operations = flops(model) if mesh.sizes.tp == 1 else None
                loss, gradients = step(model, ROWS[mesh.data_rank :: mesh.sizes.data])
                (loss,) = mesh.sum_scalars([loss])
                if rank == 0:
                    torch.save((loss, gradients, operations), Path(folder) / f"{index}.pt")
            if mesh.sizes.cp == 4 and (found := refusals(mesh)) and rank == 0:
                torch.save(found, Path(folder) / "refusals.pt")
            mesh.barrier()


def flops(model: PolicyModel) -> tuple[float, float] | None:
    """(useful, executed) operations of a step over a whole row, by a count that runs the model on a few tokens."""
    return Throughput(model).flops([pack(ROWS[0], ROW)], NLL())


def refusals(mesh: Mesh) -> dict[str, str]:
    """What a model says, on every rank, to rows and heads that cannot be cut."""
    model = build("llama")
    shard(model, mesh, torch.float64)
    shared = pack([[1] * 6, [2] * 6], ROW)
    shared.documents[1] = torch.tensor([6, 12, 0, 6])
    found = {}
    for what, block in {"uneven": pack([[1] * 6], 23), "shared prompt": shared}.items():
        with pytest.raises(ModelError) as error:
            loss_of(model, block)
        found[what] = str(error.value)
    model = build("llama")
    attach(model, Scalar(), seed=0)
    with pytest.raises(ModelError) as error:
        shard(model, mesh, torch.float64)
    found["head"] = str(error.value)
    model = PolicyModel.from_hf(tiny_model("lfm2"))
    shard(model, mesh, torch.float32)
    with pytest.raises(ModelError) as error:
        verify_cut(model)
    return found | {"convolution": str(error.value)}


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four-ranks")
    run_ranks(4, one_of_four, [free_port() for _ in MESHES], str(folder))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_one_rank(case: str, four_ranks: Path) -> None:
    loss, found, operations = torch.load(four_ranks / f"{list(CASES).index(case)}.pt")
    model = build(case)
    if "tensor parallel" not in case:
        assert operations is not None and operations == flops(model)
    expected, gradients = step(model, ROWS)
    assert loss == pytest.approx(expected, rel=1e-9)
    error, name = largest_difference(found, gradients)
    assert error < 1e-6, name


def test_what_cannot_be_cut_is_refused(four_ranks: Path) -> None:
    found: dict[str, Any] = torch.load(four_ranks / "refusals.pt")
    assert "rows of 20 or 24 tokens" in found["uneven"]
    assert "share_prompt: false" in found["shared prompt"]
    assert "the head 'score' reads whole documents" in found["head"]
    assert "something in Lfm2ForCausalLM beside attention" in found["convolution"]
