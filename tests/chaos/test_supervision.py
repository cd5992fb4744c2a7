"""Real ranks, forked on this machine, that die, hang, refuse and are asked to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import DataError, UserError
from burnish.launch.processes import free_port
from tests import tiny_run
from tests.supervision_helpers import STEPS, done, supervise
from tests.zygote import Zygote, wait_until

ROOT = Path(__file__).parents[2]


def runs(pid: int) -> bool:
    """Whether a process is there, and is more than what nobody has asked the exit code of."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def pids(folder: Path) -> list[int]:
    return [int((folder / f"pid{rank}").read_text()) for rank in range(2)]


def begin(folder: Path, *faults: str) -> subprocess.Popen[str]:
    """A supervisor in a process of its own; returns once a fault has come about a rank."""
    code = "import sys; from tests.supervision_helpers import main; sys.exit(main(*sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(folder), *faults]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: any(folder.glob("fault-*")), 20.0)
    return process


def test_whatever_happens_to_ranks_the_run_ends_well(tmp_path: Path):
    # The stopped one comes last: it goes on when it is asked where it stands, until it is killed.
    faults = {"1:1": "SIGKILL", "0:2": "orphan", "0:3": "SIGSEGV", "0:4": "bug", "1:5": "gil", "1:6": "SIGSTOP"}
    report = supervise(tmp_path, faults)
    assert done(tmp_path) == STEPS - 1
    told = [event for event in report.events if event["event"] != "restarted"]
    reasons = [event.get("reason", f"silent, stopped: {event.get('stopped')}") for event in told]
    assert [(event["event"], event["rank"], reason) for event, reason in zip(told, reasons, strict=True)] == [
        ("worker_died", 1, "ended by SIGKILL"),
        ("worker_died", 0, "ended by SIGKILL"),
        ("worker_died", 0, "ended by SIGSEGV: Fatal Python error: Segmentation fault"),
        ("worker_died", 0, "KeyError: 'no such column'"),
        ("worker_hung", 1, "silent, stopped: False"),
        ("worker_hung", 1, "silent, stopped: True"),
    ]
    assert [event["phase"] for event in told] == [f"step {step}" for step in range(1, 7)]
    assert "suffer_once" in told[2]["traceback"] and "suffer_once" in told[3]["traceback"]
    assert sorted(report.files) == ["stacks-rank1-5.txt", "stacks-rank1-6.txt"]
    assert all("in suffer_once" in text for text in report.files.values())
    for step, event in enumerate(told, 1):
        noticed = event["at"] - float((tmp_path / f"fault-{event['rank']}-{step}").read_text())
        # A death within a second; a silence within its deadline, and up to two seconds for its stacks.
        assert noticed < (1.0 if event["event"] == "worker_died" else 3.0), event
    again = [event["seconds"] for event in report.events if event["event"] == "restarted"]
    assert len(again) == 6 and max(again) < 10.0, again


def test_a_refusal_is_not_tried_again(tmp_path: Path):
    with pytest.raises(UserError) as refusal:
        supervise(tmp_path, {"1:1": "refuse"})
    assert str(refusal.value) == str(DataError("the row is not JSON", where="train.jsonl:7", cure="mend it"))
    assert not any(runs(pid) for pid in pids(tmp_path))


def test_ranks_die_with_a_supervisor_that_is_killed_the_stopped_one_too(tmp_path: Path):
    process = begin(tmp_path, "1:1=SIGSTOP")
    ranks = pids(tmp_path)
    assert all(runs(pid) for pid in ranks)
    process.kill()
    process.communicate(timeout=10)  # until nobody holds its output: no rank, and not what it was forked from
    wait_until(lambda: not any(runs(pid) for pid in ranks), 5.0)


def test_a_signal_pauses_all_ranks_and_their_lines_say_whose_they_are(tmp_path: Path):
    process = begin(tmp_path, "0:1=wait")
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 75
    assert output == "rank 0 of 2 begins at 0\nstopped after step 1\n"
    assert "[1] rank 1 of 2 begins at 0\n" in errors and "SIGTERM: stopping" in errors
    assert not any(runs(pid) for pid in pids(tmp_path))


def test_a_second_interrupt_does_not_wait_for_a_rank_that_hangs(tmp_path: Path):
    process = begin(tmp_path, "0:1=gil")
    began = time.monotonic()
    while process.poll() is None:  # the first asks all ranks to stop and waits 5 s, the second does not
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert time.monotonic() < began + 4.0
    process.communicate(timeout=10)
    assert not any(runs(pid) for pid in pids(tmp_path))


def test_the_death_of_the_process_that_ranks_are_forked_from_is_survived(tmp_path: Path):
    process = begin(tmp_path, "0:1=wait")
    nursery = int(Path(f"/proc/{pids(tmp_path)[0]}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(nursery, signal.SIGKILL)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert output.count("rank 0 of 2 begins") == 2 and done(tmp_path) == STEPS - 1


@pytest.mark.long
def test_a_run_that_was_killed_and_stopped_has_the_losses_of_one_that_was_not(
    zygote: Zygote, tmp_path: Path, tiny_model: Path, tiny_train: Path
):
    def command(name: str, launch: dict[str, Any], faults: dict[str, str]) -> list[str]:
        loss = {"type": "tests.perilous_loss:Perilous", "marks": str(tmp_path), "faults": faults}
        blocks = tiny_run.recipe(
            tiny_model,
            tiny_train,
            tmp_path / name,
            workflow={"type": "sft", "loss": loss},
            launch=launch,
            global_batch_size=4,
            checkpoint={"save_every": 3, "keep": 2},
        )
        return ["train", str(tiny_run.write_recipe(tmp_path / f"{name}.yaml", blocks))]

    # Two micro-batches a step and rank. Rank 1 dies in the fourth step; twelve micro-batches on, rank 0 is stopped.
    faults = {"1:7": "SIGKILL", "0:11": "SIGSTOP"}
    launch = {"type": "processes", "num_workers": 2, "heartbeat_seconds": 3.0}
    trial = zygote.start(command("stormy", launch, faults), tmp_path / "stormy.log")
    # Meanwhile the same two ranks without a supervisor, as torchrun would start them.
    ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    calm_command = command("calm", {"type": "local"}, {})
    calm_ranks = [zygote.start(calm_command, tmp_path / f"{rank}.log", RANK=str(rank), **ranks) for rank in range(2)]
    assert [rank.wait() for rank in calm_ranks] == [0, 0], calm_ranks[0].output() + calm_ranks[1].output()
    assert trial.wait() == 0, trial.output()

    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    assert tiny_run.losses(stormy) == tiny_run.losses(calm)
    assert len(tiny_run.losses(calm)) == 12
    tensors = [
        {path.name: path.read_bytes() for path in (run / "checkpoint-12").glob("*.safetensors")}
        for run in (calm, stormy)
    ]
    assert tensors[0] and tensors[0] == tensors[1]
    events = [json.loads(line) for line in (stormy / "events.jsonl").read_text().splitlines()]
    told = [(event["event"], event.get("rank")) for event in events]
    assert ("worker_died", 1) in told and ("worker_hung", 0) in told
    assert "in __call__" in (stormy / "stacks-rank0-2.txt").read_text()
    recovered = [event["seconds"] for event in events if event["event"] == "restarted"]
    assert recovered and max(recovered) < 30.0, recovered
