"""Rollouts dealt to two ranks give the loss, the metrics and the gradient that one rank gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from burnish.losses.rl.base import PolicyLoss
from burnish.losses.rl.gspo import GSPO
from burnish.losses.rl.ppo import PPO
from burnish.losses.rl.ppo_clip import PPOClip
from burnish.mesh import Mesh, open_mesh
from burnish.model.config import ModelConfig
from burnish.model.parallel import prepare
from burnish.model.policy_model import PolicyModel
from burnish.model.shards import whole
from burnish.policy.policy import Policy
from burnish.types import Block
from tests.policy_loss_helpers import episodes, packings
from tests.policy_model_helpers import largest_difference
from tests.ranks import run_ranks
from tests.tiny_models import tiny_model

SHAPES = [(5, [[6], [2], [3, 4, 2]]), (3, [[1], [7]]), (6, [[4], [2, 1, 3], [5]])]
HEAD = {"type": "multi", "heads": {"lm": {"type": "lm"}, "value": {"type": "scalar"}}}
LOSSES: dict[str, PolicyLoss] = {
    "by rollout": GSPO(clip_low=0.1, clip_high=0.1),
    "by token": PPO(entropy_coef=0.01),
    "by length": PPOClip.model_validate(
        {"aggregation": "constant", "constant_length": 16, "correction": {"type": "sequence_truncated"}}
    ),
}
Said = tuple[dict[str, float], dict[str, Tensor]]


def rows() -> list[Block]:
    """Four rows, the first one empty; the others have 11, 8 and 15 sampled tokens."""
    groups = episodes(SHAPES, 96, lambda _, said: torch.full((len(said),), -4.0))
    return packings(groups)["with-empty-rows"]


def steps(mesh: Mesh) -> dict[str, Said]:
    """name of a loss -> (metrics, whole gradients), the rows dealt to the ranks in turn."""
    model = PolicyModel.from_hf(tiny_model("llama"))
    prepare(model, ModelConfig.model_validate({"path": "tiny", "head": HEAD}), mesh, seed=0)
    optimizer = torch.optim.SGD([p for _, p in model.trainable_parameters()], lr=1.0)
    policy = Policy(model, optimizer, mesh=mesh, micro_batch_size=1, max_grad_norm=None)
    said = {}
    for name, loss in LOSSES.items():
        metrics = policy.forward_backward(rows()[mesh.data_rank :: mesh.sizes.data], loss)
        found = {key: total / (count or 1.0) for key, (total, count) in metrics.items()}
        said[name] = found, {key: whole(p.grad) for key, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
    return said


def one_of_two(rank: int, folder: str) -> None:
    with open_mesh("cpu") as mesh:
        said = steps(mesh)
        if rank == 0:
            torch.save(said, Path(folder) / "said.pt")
        mesh.barrier()


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Said], dict[str, Said]]:
    """By one rank, by two."""
    folder = tmp_path_factory.mktemp("two-ranks")
    run_ranks(2, one_of_two, str(folder))
    with open_mesh("cpu") as mesh:
        return steps(mesh), torch.load(folder / "said.pt")


@pytest.mark.parametrize("name", LOSSES)
def test_two_ranks_say_what_one_says(name: str, said: tuple[dict[str, Said], dict[str, Said]]) -> None:
    (metrics, theirs), (found, ours) = said[0][name], said[1][name]
    assert found == pytest.approx(metrics, rel=1e-5, abs=1e-6)
    difference, parameter = largest_difference(ours, theirs)
    assert difference < 1e-5, parameter
