"""Trials of `burnish chaos` over every kind of recipe: whatever is done to a run, its losses stay the undisturbed ones.

20 trials here, 200 with `-m long`; each is a supervised run that suffers one fault, or two, at random moments.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from burnish.launch.attempt import Limits
from burnish.launch.chaos import Arena, Verdict, open_backend, write_certificate
from burnish.launch.processes import LocalProcesses
from burnish.launch.sabotage import FAULTS, damage, plan
from burnish.recipe import load_recipe
from tests import tiny_run
from tests.e2e.test_preference import pairs

LORA = {"type": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
WHAT: dict[str, dict[str, Any]] = {
    "sft": {},
    "lora": {"model": {"adapter": LORA}},
    "preference": {"rows": "pairs", "workflow": {"type": "preference", "loss": {"type": "dpo", "beta": 0.5}}},
    "reward": {"rows": "pairs", "workflow": {"type": "reward"}, "model": {"head": {"type": "scalar"}}},
    "distill": {"workflow": {"type": "distill", "loss": {"type": "kd"}}, "model": {"adapter": LORA}},
}
LIMITS = Limits(max_restarts=10, heartbeat_seconds=4.0, start_seconds=120.0, grace_seconds=60.0)


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalProcesses]:
    with open_backend(1, tmp_path_factory.mktemp("chaos") / "trials.log") as opened:
        yield opened


@pytest.fixture(scope="module", params=WHAT)
def place(
    request: pytest.FixtureRequest, backend: LocalProcesses, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Arena:
    folder = tmp_path_factory.mktemp(request.param)
    what = dict(WHAT[request.param])
    rows = pairs(60) if what.pop("rows", None) else tiny_run.conversations(60)
    train = tiny_run.write_jsonl(folder / "train.jsonl", rows)
    blocks = tiny_run.recipe(tiny_model, train, folder / "run")
    if request.param == "distill":
        what["workflow"] |= {"teacher": {"path": str(tiny_run.write_model(folder / "teacher", seed=1))}}
    blocks["model"] |= what.pop("model", {})
    recipe = load_recipe(str(tiny_run.write_recipe(folder / "recipe.yaml", blocks | what)), [])
    return Arena(recipe, folder / "trials", 1, LIMITS, backend)


def verify(place: Arena, number: int, kinds: list[str], count: int) -> None:
    trial = place.trial(number, kinds, seed=0, count=count)
    assert trial.passed, trial
    # An interval, and the steps that were made while the newest save was on its way: fewer than another interval, since
    # the next save waits for it. Here a save takes as long as two or three steps.
    assert all(steps < 2 * place.interval for steps in trial.lost_steps), trial
    assert all(seconds < 1.0 for seconds in trial.detect_seconds), trial


@pytest.mark.parametrize("number", range(4))
def test_killed_at_random_moments_it_ends_bit_identical(place: Arena, number: int) -> None:
    verify(place, number, ["kill"], 1)


@pytest.mark.long
@pytest.mark.parametrize("number", range(4, 40))
def test_killed_at_random_moments_often(place: Arena, number: int) -> None:
    verify(place, number, ["kill"], 2)


@pytest.mark.long
@pytest.mark.parametrize("number", range(100, 110))
def test_all_kinds_of_faults(place: Arena, number: int) -> None:
    trial = place.trial(number, list(FAULTS), seed=0)
    assert trial.passed, trial


def test_a_plan_is_the_same_again_and_spreads_over_the_run() -> None:
    plans = [plan(["kill", "corrupt"], trial, steps=12, save_every=4, ranks=2, seed=0) for trial in range(50)]
    assert plans == [plan(["kill", "corrupt"], trial, steps=12, save_every=4, ranks=2, seed=0) for trial in range(50)]
    faults = [fault for each in plans for fault in each]
    assert {fault.step for fault in faults if fault.kind == "kill"} == set(range(1, 13))
    assert min(fault.step for fault in faults if fault.kind == "corrupt") == 9
    assert {fault.rank for fault in faults} == {0, 1}


def test_damage_always_changes_the_file(tmp_path: Path) -> None:
    rng = random.Random(0)
    ways = set()
    for _ in range(60):
        path = tmp_path / "file"
        content = bytes(5000) + b"x" * 4000
        path.write_bytes(content)
        ways.add(damage(path, rng).split()[0])
        assert not path.exists() or path.read_bytes() != content
    assert ways == {"removed", "bit", "page", "cut"}


@pytest.mark.parametrize("place", ["sft"], indirect=True)
def test_a_certificate_says_what_was_verified_and_of_which_checkpoint(place: Arena) -> None:
    verdict = Verdict([place.trial(50, ["kill"], seed=0)])
    path = write_certificate(place, verdict, 0)
    assert path is not None and path.name == "checkpoint-12.certificate.json"
    certificate = json.loads(path.read_text())
    assert set(certificate["verdict"]["faults"]) <= {"kill"}
    assert certificate["verdict"]["passed"] == certificate["verdict"]["trials"] == 1
    verdict.trials[0].same_losses = False
    assert write_certificate(place, verdict, 0) is None
