"""Two processes over gloo: what one wrote two read, what two wrote one reads, and one full disk stops nobody."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from burnish.model.tensor_bytes import tensor_bytes
from burnish.policy.checkpoint import Checkpointer, load_latest

TWO_RANKS = """
import json, os, resource, signal, sys, time
from pathlib import Path
import torch
from burnish.mesh import open_mesh
from burnish.policy.checkpoint import Checkpointer
from tests.distributed.test_sharded_checkpoint import tensors
from tests.rank_helpers import box, pieces

def one(rank, run):
    torch.set_num_threads(1)
    os.environ["RANK"] = str(rank)
    told = []
    with open_mesh("cpu") as mesh:
        checkpointer = Checkpointer(run, keep=2, mesh=mesh)
        loaded = checkpointer.load_latest(lambda group, name, shape: box(shape, rank, 2, 1))
        told.append(["loaded", loaded.step, loaded.state["by"], loaded.rejected])
        assert sum(tensor.numel() for tensor in loaded.tensors["model"].values()) < 2600
        mine = pieces(tensors(10), rank, 2, 1)
        for group, members in loaded.tensors.items():
            for name, tensor in members.items():
                assert torch.equal(tensor, mine[group][name].tensor), name
        for step in (20, 30, 40):
            if step == 30 and rank == 1:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
            if step == 40 and rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            checkpointer.save(step, pieces(tensors(step), rank, 2, 1), {"by": 2, "rank": rank})
            outcomes, polls = [], 0
            while not outcomes and polls < 5000:
                time.sleep(0.002)
                outcomes, polls = checkpointer.poll(), polls + 1
            (outcome,) = outcomes
            told.append([outcome.kind, outcome.step, getattr(outcome, "reason", "")])
            if rank == 0:
                told.append(sorted(os.listdir(run)))
            mesh.barrier()
        (run.parent / f"{rank}.json").write_text(json.dumps(told))
        mesh.barrier()
        os._exit(0)

run = Path(sys.argv[1])
children = []
for rank in (0, 1):
    pid = os.fork()  # no torch operator has run in this process yet
    if pid == 0:
        try:
            one(rank, run)
        finally:
            import traceback
            traceback.print_exc()
            os._exit(1)
    children.append(pid)
signal.signal(signal.SIGALRM, lambda *_: [os.kill(pid, signal.SIGKILL) for pid in children])
signal.alarm(60)
sys.exit(any([os.waitpid(pid, 0)[1] for pid in children]))
"""


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    weight = torch.arange(5000.0).reshape(1000, 5) + step
    return {"model": {"weight": weight, "scale": torch.tensor(step / 3)}, "optimizer": {"exp_avg.weight": weight / 7}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that one process began and two went on with."""
    run = tmp_path_factory.mktemp("two-processes") / "run"
    run.mkdir()
    Checkpointer(run, keep=2).save(10, tensors(10), {"by": 1}, wait=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", TWO_RANKS, str(run)]
    subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, check=True, timeout=100)
    return run


def test_both_ranks_are_told_the_same(run):
    first, second = (json.loads((run.parent / f"{rank}.json").read_text()) for rank in (0, 1))
    assert [item for item in first if isinstance(item[1], int)] == second
    assert first[0] == ["loaded", 10, 1, []]
    assert first[1:3] == [["checkpoint_saved", 20, ""], ["checkpoint-10", "checkpoint-20"]]
    assert first[3][:2] == ["checkpoint_failed", 30]
    assert first[3][2].startswith("rank 1: [Errno 27] File too large: ") and "-00002-of-00002" in first[3][2]
    assert first[4] == ["checkpoint-10", "checkpoint-20"], "nothing of 30 is left"
    assert first[5:] == [["checkpoint_saved", 40, ""], ["checkpoint-20", "checkpoint-40"]]


def test_one_process_reads_what_two_wrote(run):
    loaded = load_latest(run)
    assert loaded is not None and (loaded.step, loaded.rejected) == (40, []) and loaded.state == {"by": 2, "rank": 0}
    assert (run / "checkpoint-40" / "model-00002-of-00002.safetensors").exists()
    for group, members in tensors(40).items():
        for name, tensor in members.items():
            assert bytes(tensor_bytes(loaded.tensors[group][name])) == bytes(tensor_bytes(tensor))
