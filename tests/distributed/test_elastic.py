"""`determinism: elastic`: the same bits on 1, 2 and 4 ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.losses.nll import NLL
from burnish.mesh import open_mesh
from burnish.mesh_config import MeshConfig
from burnish.model.adapters.lora import LoRA
from burnish.model.parallel import shard
from burnish.model.policy_model import PolicyModel
from burnish.model.shards import whole
from burnish.policy.elastic import sum_in_tree
from burnish.policy.optimizers.adamw import AdamW
from burnish.policy.policy import Policy
from burnish.types import Block
from tests.policy_model_helpers import pack, random_documents
from tests.ranks import run_ranks
from tests.tiny_models import tiny_model

CASES = {"full": None, "lora with dropout": LoRA(r=4, lora_dropout=0.2)}
STEPS, ROWS, MICRO = 6, 16, 2


def rows(step: int) -> list[Block]:
    """A step's rows, the last two of them padding: 16 rows in micro-batches of 2."""
    blocks = [pack(random_documents([11, 6, 3], 100, seed=100 * step + i), 24) for i in range(ROWS)]
    empty = replace(
        blocks[0],
        loss_mask=torch.zeros_like(blocks[0].loss_mask),
        document_ids=torch.full_like(blocks[0].document_ids, -1),
        documents=torch.zeros_like(blocks[0].documents),
        group_ids=torch.full_like(blocks[0].group_ids, -1),
        sample_ids=(),
    )
    return [*blocks[:-2], empty, empty]


def train(case: str, mesh: Any, elastic: bool) -> dict[str, Any]:
    """What six large steps write down, and the weights after them."""
    model = PolicyModel.from_hf(tiny_model("llama", vocab_size=100, hidden_size=48), pad_vocab_to=1)
    if (lora := CASES[case]) is not None:
        lora.apply(model, seed=0)
    shard(model, mesh, torch.float32)
    if elastic:
        sum_in_tree(model)
    optimizer = AdamW(learning_rate=0.03, weight_decay=0.1).open(model.trainable_parameters(), fused=not elastic)
    policy = Policy(model, optimizer, mesh=mesh, micro_batch_size=MICRO, max_grad_norm=1.0, elastic=elastic)
    lines = []
    for step in range(STEPS):
        mine = [row for i, row in enumerate(rows(step)) if i // MICRO % mesh.sizes.data == mesh.data_rank]
        metrics = policy.forward_backward(mine, NLL())
        update = policy.optim_step(0.03)
        lines.append((*metrics["loss"], update.grad_norm))
    weights = {name: whole(parameter) for name, parameter in model.trainable_parameters()}
    return {"lines": lines, "weights": weights}


def one_rank_of(rank: int, folder: str, config: dict[str, int]) -> None:
    with open_mesh("cpu", MeshConfig.model_validate(config)) as mesh:
        found = {(case, elastic): train(case, mesh, elastic) for case in CASES for elastic in (True, False)}
        if rank == 0:
            torch.save(found, Path(folder) / "found.pt")
        mesh.barrier()


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, bool], dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with open_mesh("cpu") as mesh:
        found = {(case, elastic): train(case, mesh, elastic) for case in CASES for elastic in (True, False)}
    torch.set_num_threads(threads)
    return found


@pytest.mark.parametrize(
    ("ranks", "config"),
    [
        pytest.param(2, {}, marks=pytest.mark.long),
        pytest.param(4, {}, marks=pytest.mark.long),
        (4, {"dp_replicate": 2}),
    ],
)
def test_losses_and_weights_have_the_same_bits_on_any_number_of_ranks(
    ranks: int, config: dict[str, int], alone: dict, tmp_path: Path
) -> None:
    run_ranks(ranks, one_rank_of, str(tmp_path), config)
    found = torch.load(tmp_path / "found.pt")
    for case in CASES:
        elastic, expected = found[case, True], alone[case, True]
        assert elastic["lines"] == expected["lines"], case
        for name, weight in expected["weights"].items():
            assert torch.equal(elastic["weights"][name], weight), (case, name)
        rounded = found[case, False]["lines"]
        assert rounded != alone[case, False]["lines"], f"{case}: the other way agrees by chance, and proves nothing"
        assert torch.tensor(rounded) == pytest.approx(torch.tensor(alone[case, False]["lines"]), rel=1e-2)
