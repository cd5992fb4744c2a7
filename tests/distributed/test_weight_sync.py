"""What leaves a trainer that is cut over ranks is what one rank would send."""

from __future__ import annotations

from pathlib import Path

import pytest

from burnish.mesh import open_mesh
from burnish.mesh_config import MeshConfig
from burnish.model.adapters.lora import LoRA
from burnish.model.config import ModelConfig
from burnish.model.load import load_model
from burnish.rollout.weights import digest_of, outgoing
from tests.ranks import run_ranks


def digests(config: ModelConfig, mesh_config: MeshConfig) -> list[str]:
    """Of the whole model and of the adapter alone, on this rank."""
    with open_mesh("cpu", mesh_config) as mesh:
        model = load_model(config, mesh, seed=0)
        return [digest_of(outgoing(model, adapter_only=alone)) for alone in (False, True)]


def ranks_send(rank: int, config: ModelConfig, mesh_config: MeshConfig, alone: list[str]) -> None:
    nothing = digest_of([])
    assert digests(config, mesh_config) == (alone if rank == 0 else [nothing, nothing])


@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.long)])
def test_two_ranks_send_what_one_does_and_the_first_alone_yields_it(tp: int, tiny_model: Path):
    config = ModelConfig(path=str(tiny_model), adapter=LoRA(r=4, target_modules=["q_proj", "down_proj"]))
    alone = digests(config, MeshConfig())
    assert len({*alone, digest_of([])}) == 3
    run_ranks(2, ranks_send, config, MeshConfig(tp=tp), alone)
