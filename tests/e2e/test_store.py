"""A run whose checkpoints lie in a store goes on where its machine is gone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests import tiny_run
from tests.e2e_helpers import Lab
from tests.zygote import Zygote


@pytest.fixture(scope="module")
def lab(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_train: Path) -> Lab:
    return Lab(zygote, tmp_path_factory.mktemp("store"), tiny_model, tiny_train)


def test_a_run_goes_on_on_an_empty_machine_and_is_exported_there(lab: Lab) -> None:
    undisturbed = tiny_run.losses(lab.train("undisturbed", num_steps=8))
    store = f"file://{lab.folder}/bucket/run"
    stored = {"num_steps": 8, "checkpoint": {"save_every": 3, "keep": 1, "store": store}}
    first = lab.train("first", "stop_after=5", expect=75, **stored)
    assert not list(first.glob("checkpoint-*"))
    shutil.rmtree(first)

    second = lab.train("second", **stored)
    assert tiny_run.losses(second) == undisturbed
    assert [path.name for path in (lab.folder / "bucket" / "run").glob("*.COMMIT")] == ["checkpoint-8.COMMIT"]
    code, output = lab.burnish("export", second, "--to", lab.folder / "exported")
    assert code == 0 and "step 8 exported" in output, output
    assert "finished after step 8" in lab.resume("second")

    output = lab.resume("second", "checkpoint={save_every: 3}", expect=2)
    assert f"this run has its checkpoints in {store}" in output
    code, output = lab.burnish("train", lab.recipe("third", **stored | {"seed": 4}))
    assert code == 2 and "seed: " in output and "started with another recipe" in output, output
