"""The order in which a run's parts are opened: cheap refusals first."""

from __future__ import annotations

from pathlib import Path

import pytest

from burnish.errors import DataError
from burnish.launch.local import slurm_ranks
from burnish.recipe import Recipe
from tests import tiny_run


def test_a_missing_eval_file_is_refused_before_the_weights_are_read(tiny_model: Path, tiny_train: Path, tmp_path: Path):
    model = tmp_path / "model-without-weights"
    model.mkdir()
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (model / file.name).write_bytes(file.read_bytes())
    blocks = tiny_run.recipe(model, tiny_train, tmp_path / "run")
    blocks["data"]["eval"] = [{"type": "jsonl", "path": str(tmp_path / "nowhere.jsonl")}]
    recipe = Recipe.model_validate(blocks)
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        recipe.launch.run(recipe)


SRUN = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu-[03-05,9],cpu1", "gpu-03"), ("a1,a2", "a1"), ("single", "single"), ("n[7]", "n7"), ("r[1-2]c", "r1c")],
)
def test_sruns_variables_become_torchruns(nodes: str, first: str) -> None:
    found = slurm_ranks(SRUN | {"SLURM_STEP_NODELIST": nodes})
    assert found.pop("MASTER_PORT") == str(20_000 + 1234 * 8 + 2)
    assert found == {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": first}


def test_a_batch_script_and_torchrun_are_left_alone() -> None:
    batch = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1234"}
    assert slurm_ranks(batch) == {}
    assert slurm_ranks(SRUN | {"RANK": "0"}) == {}
    given = SRUN | {"SLURM_STEP_NODELIST": "x", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5"}
    assert {slurm_ranks(given)[name] for name in ("MASTER_ADDR", "MASTER_PORT")} == {"10.0.0.1", "5"}
