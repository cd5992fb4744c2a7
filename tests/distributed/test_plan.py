"""A plan says what two real ranks then hold and exchange, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from burnish.mesh import Mesh, open_mesh
from burnish.mesh_config import Sizes
from burnish.model.adapters.lora import LoRA
from burnish.model.config import ModelConfig
from burnish.model.parallel import prepare
from burnish.model.plan import Plan, Work, plan
from burnish.model.policy_model import PolicyModel
from burnish.model.shards import local
from burnish.model.tensor_parallel import finish_gradients
from burnish.model.traffic import CountExchanges, axes
from tests.policy_model_helpers import pack, random_documents
from tests.ranks import run_ranks
from tests.tiny_models import tiny_config, tiny_model

ROW = 24
MICRO_BATCHES = 2
CASES: dict[str, tuple[str, Sizes, dict[str, Any], dict[str, Any]]] = {
    "sharded, uneven": ("llama", Sizes(1, 2, 1, 1), {"intermediate_size": 47}, {}),
    "sharded, lora, bfloat16": (
        "llama",
        Sizes(1, 2, 1, 1),
        {},
        {"dtype": "bfloat16", "adapter": LoRA(r=3), "activation_checkpointing": "full"},
    ),
    "copies": ("llama", Sizes(2, 1, 1, 1), {}, {"dtype": "bfloat16"}),
    "layers cut": ("llama", Sizes(1, 1, 1, 2), {}, {}),
    "layers cut, tied, recomputed": ("qwen3", Sizes(1, 1, 1, 2), {"tie_word_embeddings": True, "num_hidden_layers": 4},
                                     {"activation_checkpointing": "full"}),
    "rows cut": ("llama", Sizes(1, 1, 2, 1), {"num_hidden_layers": 3}, {"activation_checkpointing": "selective"}),
}  # fmt: skip


def config_of(case: str) -> ModelConfig:
    return ModelConfig(path="nowhere", pad_vocab_to=64, **CASES[case][3])


def mesh_of(sizes: Sizes, rank: int) -> Mesh:
    """Another layout of the ranks of a group that is open."""
    device_mesh = init_device_mesh("cpu", tuple(sizes), mesh_dim_names=Sizes._fields)
    if sizes.cp > 1:
        device_mesh["dp_shard", "cp"]._flatten("shard")
    return Mesh(torch.device("cpu"), rank, sizes.world, sizes, device_mesh)


def one_of_two(rank: int, folder: str) -> None:
    """A rank takes a step of every case, and writes down what it held and what reached it."""
    found = {}
    with open_mesh("cpu") as opened:
        for case, (family, sizes, overrides, _) in CASES.items():
            config, mesh = config_of(case), mesh_of(sizes, rank)
            causal_lm = tiny_model(family, vocab_size=100, **overrides).to(getattr(torch, config.dtype))
            model = PolicyModel.from_hf(causal_lm, pad_vocab_to=64)
            prepare(model, config, mesh, seed=0)
            with CountExchanges(axes(mesh)) as count:
                for micro_batch in range(MICRO_BATCHES):
                    block = pack(random_documents([11, 9], 100, seed=micro_batch), ROW)
                    outputs = model(
                        block,
                        needs=frozenset({"weighted_nll"}),
                        reads=block.loss_mask,
                        coefficients=block.loss_mask.float(),
                    )
                    assert outputs.weighted_nll is not None
                    outputs.weighted_nll.backward()
                finish_gradients(model, mesh)
            trained = model.trainable_parameters()
            optimizer = torch.optim.AdamW([parameter for _, parameter in trained])
            optimizer.step()
            moments = [s[kind] for s in optimizer.state.values() for kind in ("exp_avg", "exp_avg_sq")]
            found[case] = {
                "weights": sum(local(p).nbytes for p in model.parameters()),
                "gradients": sum(local(p.grad).nbytes for _, p in trained if p.grad is not None),
                "optimizer": sum(local(moment).nbytes for moment in moments),
                "traffic": {" ".join(key): size for key, size in count.seen.items() if size},
            }
        opened.barrier()
        Path(folder, f"{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two-ranks")
    run_ranks(2, one_of_two, str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def planned(case: str, sizes: Sizes | None = None) -> Plan:
    family, own, overrides, _ = CASES[case]
    hf_config = tiny_config(family, vocab_size=100, **overrides)
    work = Work(rows=MICRO_BATCHES * own.data, micro_batch_size=1, row_length=ROW)
    return plan(config_of(case), hf_config, sizes or own, work)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_hold_and_exchange_what_was_planned(case: str, two_ranks: list[dict[str, Any]]) -> None:
    recompute = config_of(case).activation_checkpointing
    assert recompute != "auto"
    found, expected = two_ranks[0][case], planned(case)
    memory = expected.memory(recompute)
    assert {part: memory[part][0] for part in ("weights", "gradients", "optimizer")} == {
        part: found[part] for part in ("weights", "gradients", "optimizer")
    }
    assert two_ranks[1][case]["weights"] <= found["weights"], "the first rank has the largest shards"
    traffic = {" ".join(key): size for key, size in expected.traffic(recompute).items()}
    real = dict(found["traffic"])
    # How much a head sums depends on the loss and on the tokens it reads, here 18 of 24: the plan has the most it can
    # be. A loss that is one number is the least that ranks of `cp` sum.
    for axis, least in (("tp", 0.7), ("cp", 0.04)):
        if CASES[case][1]._asdict()[axis] > 1:
            bound, summed = traffic.pop(f"{axis} all-reduce"), real.pop(f"{axis} all-reduce")
            assert least * bound <= summed <= bound
    if CASES[case][1].cp > 1:  # one group for both, where there is no other to shard over
        for kind in ("all-gather", "reduce-scatter"):
            traffic[f"cp {kind}"] += traffic.pop(f"shard {kind}")
    assert traffic == real


@pytest.mark.parametrize("case", CASES)
def test_arithmetic_says_the_same_as_shards(case: str) -> None:
    sizes = CASES[case][1]
    one_share = planned(case, sizes._replace(dp_replicate=1, dp_shard=1))
    for replicate, shard in ((sizes.dp_replicate, sizes.dp_shard), (3, 5)):
        expected = planned(case, sizes._replace(dp_replicate=replicate, dp_shard=shard))
        found = one_share.laid_out(replicate, shard)
        assert found == expected
        assert found.memory("full") == expected.memory("full")
        assert found.traffic("full") == expected.traffic("full")
