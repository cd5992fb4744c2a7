"""A disk that refuses a checkpoint: the run goes on, says so, and the checkpoints before are as they were.

The kernel refuses by a limit on the size of a file (setrlimit(2), RLIMIT_FSIZE), set on the running command from
outside and lifted again: 300 kB hold the weights, the metrics and the export of the tiny model (228 kB), not the
optimizer's moments (457 kB).
"""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest

from burnish.policy.checkpoint import load_latest
from tests import tiny_run
from tests.e2e_helpers import Lab, events
from tests.zygote import Trial, Zygote, wait_until

FULL, ROOMY = 300_000, resource.RLIM_INFINITY


RUN = {"num_steps": 24, "checkpoint": {"save_every": 4, "keep": 2}}


@pytest.fixture(scope="module")
def lab(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_train: Path) -> Lab:
    return Lab(zygote, tmp_path_factory.mktemp("disk-full"), tiny_model, tiny_train)


@pytest.fixture(scope="module")
def undisturbed(lab: Lab) -> list[tuple[int, float, float]]:
    return tiny_run.losses(lab.train("undisturbed", **RUN))


def limit(trial: Trial, size: int) -> None:
    """Bytes that one file may have from now on, for the command alone."""
    resource.prlimit(trial.pid, resource.RLIMIT_FSIZE, (size, ROOMY))


def test_a_run_outlives_a_full_disk_and_saves_again_once_there_is_room(
    lab: Lab, undisturbed: list[tuple[int, float, float]]
) -> None:
    recipe, run_dir = lab.recipe("run", **RUN), lab.folder / "run"
    trial = lab.zygote.start(["train", str(recipe)], lab.folder / "run.log")

    wait_until(lambda: (run_dir / "checkpoint-4").is_dir())
    limit(trial, FULL)
    wait_until(lambda: bool(events(run_dir, "checkpoint_failed")))
    trial.kill(signal.SIGSTOP)
    first = events(run_dir, "checkpoint_failed")[0]
    loaded = load_latest(run_dir)
    assert loaded is not None and loaded.step < first["step"] and not loaded.rejected
    assert "File too large" in first["reason"] and "optimizer.safetensors" in first["reason"]
    limit(trial, ROOMY)
    trial.kill(signal.SIGCONT)

    assert trial.wait() == 0, trial.output()
    assert f"checkpoint_failed: step={first['step']}" in trial.output()
    assert tiny_run.losses(run_dir) == undisturbed
    assert {path.name for path in run_dir.glob("checkpoint-*")} == {"checkpoint-20", "checkpoint-24"}
    loaded = load_latest(run_dir)
    assert loaded is not None and loaded.step == 24


def test_a_run_that_is_stopped_on_a_full_disk_says_what_was_not_saved(
    lab: Lab, undisturbed: list[tuple[int, float, float]]
) -> None:
    recipe, run_dir = lab.recipe("stopped", **RUN), lab.folder / "stopped"
    trial = lab.zygote.start(["train", str(recipe), "stop_after=6"], lab.folder / "stopped.log")
    limit(trial, FULL)
    assert trial.wait() == 75, trial.output()
    assert "checkpoint NOT saved" in trial.output()
    assert [event["step"] for event in events(run_dir, "checkpoint_failed")] == [4, 6]
    assert not list(run_dir.glob("checkpoint-*"))
    lab.resume("stopped")
    assert tiny_run.losses(run_dir) == undisturbed
