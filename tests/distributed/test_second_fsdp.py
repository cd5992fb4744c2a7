"""Two ranks, each with half of policy and second model, answer what one rank answers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.losses.dpo import DPO
from burnish.losses.kd import KD
from burnish.losses.kto import KTO
from burnish.losses.topk_kd import TopKKD
from burnish.mesh import Mesh, open_mesh
from burnish.model.parallel import fsdp_modules
from burnish.policy.mismatch import log_ratio, mismatched
from burnish.policy.policy import Policy
from burnish.policy.second import Reference, Teacher
from burnish.types import Block
from tests import tiny_run
from tests.preference_helpers import token_block
from tests.ranks import run_ranks
from tests.second_helpers import LORA, PAIRS, open_policy, student, surroundings
from tests.tiny_models import tiny_model

REFERENCES = {"adapter-off": {"adapter": LORA | {"lora_dropout": 0.0}}, "frozen-copy": {}}


def rows() -> list[Block]:
    """Three rows for each of two ranks: of one pair and empty ones on rank 0, of four pairs on rank 1, whose mismatched
    pairs take more rows."""
    empty = token_block(PAIRS[:1], 32, shared=True)
    for tensor in (empty.loss_mask, empty.documents):
        tensor.zero_()
    empty.document_ids.fill_(-1)
    empty.group_ids.fill_(-1)
    empty.sample_ids = ()
    filled = [token_block([pair], 32, shared=True) for pair in PAIRS]
    return [filled[0], filled[1], empty, filled[2], empty, token_block(PAIRS[3:], 32, shared=True)]


def answers(folder: Path, mesh: Mesh) -> dict[str, Any]:
    """What the rows of this rank get from every kind of second model, summed over the ranks."""
    blocks = rows()[mesh.rank :: mesh.world_size]
    found: dict[str, Any] = {}
    for name, model in REFERENCES.items():
        policy = open_policy(Reference(), surroundings(student(folder / "student", **model), mesh, folder))
        summed, count = policy.evaluate(blocks, DPO())["loss"]
        found[f"{name}, initial loss"] = summed / count
        with torch.no_grad():
            for _, parameter in policy.model.trainable_parameters():
                parameter.add_(0.02)
        found[f"{name}, kl"] = mismatched_kl(policy, blocks)
        found[f"{name}, moved loss"] = policy.forward_backward(blocks, DPO())["loss"][0]
        found[f"{name}, gradient"] = policy.optim_step(1e-3).grad_norm
    teacher = Teacher(path=str(folder / "teacher"), top_k=5)
    policy = open_policy(teacher, surroundings(student(folder / "student"), mesh, folder))
    second: Any = policy.second
    assert len(fsdp_modules(second.model)) == (0 if mesh.world_size == 1 else 3)
    found["divergence"] = policy.forward_backward(blocks, KD())["loss"][0]
    found["divergence, gradient"] = policy.optim_step(1e-3).grad_norm
    found["top-k"] = policy.evaluate(blocks, TopKKD())["loss"][0]
    return found


def mismatched_kl(policy: Policy, blocks: list[Block]) -> float:
    """The column that KTO asks; on one rank the same made from the shares of two, each of which pairs its own rows."""
    if policy.mesh.world_size == 2:
        return max(float(block.columns["kto_kl"].max()) for block in policy.annotated(blocks, KTO()))
    assert policy.second is not None
    total, count = 0.0, 0
    for share in (blocks[::2], blocks[1::2]):
        pairs = policy.second.annotate(mismatched(share), DPO())
        summed, documents = log_ratio(pairs, policy.logprobs(pairs))
        total, count = total + summed, count + documents
    return max(0.0, total / count)


def one_of_two(rank: int, folder: str) -> None:
    """A rank's process; rank 0 writes down what came out."""
    with open_mesh("cpu") as mesh:
        found = answers(Path(folder), mesh)
        if rank == 0:
            torch.save(found, Path(folder) / "found.pt")
        mesh.barrier()


def test_two_ranks_answer_what_one_does(tmp_path: Path) -> None:
    for name, more in (("student", {}), ("teacher", {"seed": 5, "vocab_size": 352, "hidden_size": 48})):
        tiny_model("llama", **{"vocab_size": 320, **more}).save_pretrained(tmp_path / name)
        tiny_run.write_tokenizer(tmp_path / name)
    run_ranks(2, one_of_two, str(tmp_path))
    found = torch.load(tmp_path / "found.pt")
    with open_mesh("cpu") as mesh:
        expected = answers(tmp_path, mesh)
    for name in REFERENCES:
        assert found[f"{name}, initial loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert expected[f"{name}, initial loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert abs(found[f"{name}, moved loss"] / 5 - math.log(2)) > 1e-2
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
