"""SIGKILL at random moments: the same command goes on, and the losses are those of an undisturbed run."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_run
from tests.zygote import Zygote, wait_until

LORA = {"type": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1}


class Experiment:
    """One recipe, its undisturbed run, and disturbed runs beside it."""

    def __init__(self, zygote: Zygote, folder: Path, model_path: Path, train: Path, **changes: Any) -> None:
        self.zygote, self.folder = zygote, folder
        blocks = tiny_run.recipe(model_path, train, folder / "undisturbed", **changes)
        self.recipe = tiny_run.write_recipe(folder / "recipe.yaml", blocks)
        code, output = zygote.run(["train", str(self.recipe)], folder / "undisturbed.log")
        assert code == 0, output
        self.expected = tiny_run.losses(folder / "undisturbed")
        self.weights = self.checkpoint("undisturbed")

    def checkpoint(self, name: str) -> dict[str, bytes]:
        """Bytes of every tensor file of the last checkpoint."""
        last = max((self.folder / name).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        return {path.name: path.read_bytes() for path in sorted(last.glob("*.safetensors"))}

    def command(self, name: str, *overrides: str) -> list[str]:
        return ["train", str(self.recipe), f"run_dir={self.folder / name}", *overrides]

    def kill_and_resume(self, name: str, rng: random.Random) -> None:
        """Kills the run after a random number of finished steps, twice, then lets it finish."""
        metrics = self.folder / name / "metrics.jsonl"
        for _ in range(2):
            trial = self.zygote.start(self.command(name), self.folder / f"{name}.log")
            steps = rng.randint(0, 11)
            wait_until(lambda least=steps: metrics.exists() and metrics.read_bytes().count(b"\n") >= least)
            trial.kill()
            assert trial.wait() in (-signal.SIGKILL, 0)  # 0: it was faster than the kill
        code, output = self.zygote.run(self.command(name), self.folder / f"{name}.log")
        assert code == 0, output
        assert tiny_run.losses(self.folder / name) == self.expected
        assert self.checkpoint(name) == self.weights


@pytest.fixture(scope="module", params=["full", "lora"])
def experiment(
    request: pytest.FixtureRequest,
    zygote: Zygote,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    tiny_train: Path,
) -> Experiment:
    model = {"path": str(tiny_model)} | ({"adapter": LORA} if request.param == "lora" else {})
    return Experiment(zygote, tmp_path_factory.mktemp(request.param), tiny_model, tiny_train, model=model)


def test_sigkill_at_a_random_step(experiment: Experiment) -> None:
    experiment.kill_and_resume("killed", random.Random(0))  # 200 more, of every kind of run: test_chaos.py


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_checkpoints_and_exits_75(experiment: Experiment, number: signal.Signals) -> None:
    name = f"signalled-{number}"
    metrics = experiment.folder / name / "metrics.jsonl"
    trial = experiment.zygote.start(experiment.command(name), experiment.folder / f"{name}.log")
    wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 2)
    trial.kill(number)
    assert trial.wait() == 75, trial.output()
    done = len(tiny_run.losses(experiment.folder / name))
    assert 2 <= done < 12
    assert (experiment.folder / name / f"checkpoint-{done}").is_dir()
    code, output = experiment.zygote.run(experiment.command(name), experiment.folder / f"{name}.log")
    assert code == 0, output
    assert tiny_run.losses(experiment.folder / name) == experiment.expected
    assert experiment.checkpoint(name) == experiment.weights


def test_stop_after_pauses_between_checkpoints(experiment: Experiment) -> None:
    code, output = experiment.zygote.run(experiment.command("paused", "stop_after=6"), experiment.folder / "paused.log")
    assert code == 75, output
    assert len(tiny_run.losses(experiment.folder / "paused")) == 6
    code, output = experiment.zygote.run(experiment.command("paused"), experiment.folder / "paused.log")
    assert code == 0, output
    assert tiny_run.losses(experiment.folder / "paused") == experiment.expected


def test_a_damaged_newest_checkpoint_is_passed_over(experiment: Experiment) -> None:
    code, output = experiment.zygote.run(experiment.command("damaged", "stop_after=10"), experiment.folder / "d.log")
    assert code == 75, output
    run = experiment.folder / "damaged"
    newest = run / "checkpoint-10" / "optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[-100] ^= 4
    newest.write_bytes(content)
    code, output = experiment.zygote.run(experiment.command("damaged"), experiment.folder / "d.log")
    assert code == 0, output
    assert tiny_run.losses(run) == experiment.expected
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    rejected = [event["reason"] for event in events if event["event"] == "checkpoint_rejected"]
    assert len(rejected) == 1 and "checkpoint-10: optimizer.safetensors: tensor" in rejected[0]


def test_a_second_owner_is_refused(experiment: Experiment) -> None:
    name = "owned"
    first = experiment.zygote.start(experiment.command(name, "num_steps=100000"), experiment.folder / "first.log")
    metrics = experiment.folder / name / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 1)
    code, output = experiment.zygote.run(experiment.command(name, "num_steps=100000"), experiment.folder / "second.log")
    assert code == 2 and str(first.pid) in output
    first.kill()
    first.wait()
    # The dead owner's lock is free by itself.
    code, output = experiment.zygote.run(
        experiment.command(name, "num_steps=100000", "stop_after=1"), experiment.folder / "third.log"
    )
    assert code == 75, output


def test_a_changed_fixed_field_is_refused_with_the_difference(experiment: Experiment) -> None:
    code, output = experiment.zygote.run(experiment.command("undisturbed", "seed=7"), experiment.folder / "changed.log")
    assert code == 2
    assert "seed: 0 -> 7" in output
