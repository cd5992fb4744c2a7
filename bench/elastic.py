"""What `determinism: elastic` costs a step of a small model: `python -m bench.elastic`.

On one rank and on two that share the machine, both ways in turn in the same processes, each rank with one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing

from bench.report import report
from burnish.losses.nll import NLL
from burnish.mesh import Mesh, open_mesh
from burnish.model.parallel import shard
from burnish.model.policy_model import PolicyModel, one_document
from burnish.policy.elastic import sum_in_tree
from burnish.policy.optimizers.adamw import AdamW
from burnish.policy.policy import Policy

VOCABULARY, LENGTH, ROWS = 8192, 256, 8


def open_policy(mesh: Mesh, elastic: bool) -> Policy:
    """A Llama of 13 million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = PolicyModel.from_hf(LlamaForCausalLM(config))
    shard(model, mesh, torch.float32)
    if elastic:
        sum_in_tree(model)
    optimizer = AdamW().open(model.trainable_parameters(), fused=not elastic)
    return Policy(model, optimizer, mesh=mesh, micro_batch_size=1, max_grad_norm=1.0, elastic=elastic)


def measure(mesh: Mesh, rounds: int) -> list[list[float]]:
    """[fixed, elastic] seconds of a step of 8 rows of 256 tokens, for each round."""
    policies = [open_policy(mesh, elastic) for elastic in (False, True)]
    generator = torch.Generator().manual_seed(0)
    rows = [one_document(torch.randint(0, VOCABULARY, (LENGTH,), generator=generator)) for _ in range(ROWS)]
    mine = rows[mesh.rank :: mesh.world_size]
    seconds = []
    for _ in range(rounds + 1):
        seconds.append([])
        for policy in policies:
            mesh.barrier()
            begin = time.perf_counter()
            policy.forward_backward(mine, NLL())
            policy.optim_step(1e-4)
            seconds[-1].append(time.perf_counter() - begin)
    return seconds[1:]


def one_rank(rank: int, count: int, port: int, rounds: int, to: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with open_mesh("cpu") as mesh:
        seconds = measure(mesh, rounds)
        if rank == 0:
            Path(to).write_text(json.dumps(seconds))
        mesh.barrier()
        os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    rows = []
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            probe.close()
            to = f"{folder}/seconds.json"
            multiprocessing.spawn(one_rank, (count, port, rounds, to), nprocs=count)
            seconds = json.loads(Path(to).read_text())
        ratios = [elastic / fixed for fixed, elastic in seconds]
        medians = [statistics.median(column) for column in zip(*seconds, strict=True)]
        rows.append(
            {
                "ranks": count,
                "fixed s": medians[0],
                "elastic s": medians[1],
                "ratio": statistics.median(ratios),
            }
        )
    report("elastic", rows)


if __name__ == "__main__":
    main()
