"""bfloat16 with float32 masters, whole runs: the sharded path on one rank, which float32 runs never enter."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import tiny_run
from tests.zygote import Zygote

LORA = {"type": "lora", "r": 4, "lora_alpha": 8}


@pytest.mark.parametrize("adapter", [pytest.param(None, marks=pytest.mark.long), LORA], ids=["full", "lora"])
def test_every_parameter_is_trained_and_a_resume_is_exact(
    adapter: dict[str, object] | None, zygote: Zygote, tiny_model: Path, tiny_train: Path, tmp_path: Path
) -> None:
    model = {"path": str(tiny_model), "dtype": "bfloat16"} | ({"adapter": adapter} if adapter else {})
    blocks = tiny_run.recipe(tiny_model, tiny_train, tmp_path / "whole", model=model, num_steps=6, eval_every=2)
    blocks["checkpoint"] = {"save_every": 3, "keep": 3}
    blocks["data"]["eval"] = [{"type": "jsonl", "path": str(tiny_train)}]
    recipe = tiny_run.write_recipe(tmp_path / "recipe.yaml", blocks)

    code, output = zygote.run(["train", str(recipe)], tmp_path / "whole.log")
    assert code == 0, output
    paused = ["train", str(recipe), f"run_dir={tmp_path / 'paused'}"]
    code, output = zygote.run([*paused, "stop_after=3"], tmp_path / "paused.log")
    assert code == 75, output
    code, output = zygote.run(paused, tmp_path / "paused.log")
    assert code == 0, output

    assert tiny_run.losses(tmp_path / "paused") == tiny_run.losses(tmp_path / "whole")
    start = load_file(tmp_path / "paused" / "checkpoint-3" / "model.safetensors")
    end = load_file(tmp_path / "whole" / "checkpoint-6" / "model.safetensors")
    resumed = load_file(tmp_path / "paused" / "checkpoint-6" / "model.safetensors")
    for name, tensor in end.items():
        assert tensor.dtype.itemsize == 4, f"{name} has no float32 master"
        assert resumed[name].equal(tensor), name
        assert not start[name].equal(tensor), f"{name} did not move"
    if adapter is None:
        assert "model.embed_tokens.weight" in end and "model.norm.weight" in end
