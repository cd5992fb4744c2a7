"""A run with an adapter of every kind at once: it stops and goes on bit for bit, and writes what it trained alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import tiny_run
from tests.e2e_helpers import Lab, column
from tests.zygote import Zygote

ADAPTER = {
    "type": "lora", "r": 4, "use_rslora": True, "use_dora": True, "lora_dropout": 0.1,
    "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["embed_tokens", "norm"],
}  # fmt: skip
LAYERS = [f"model.layers.{index}.{name}" for index in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")]
PARTS = ("lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector.default.weight")
SAVED = ("model.embed_tokens", "model.norm")


@pytest.fixture(scope="module")
def lab(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_train: Path) -> Lab:
    return Lab(zygote, tmp_path_factory.mktemp("adapters"), tiny_model, tiny_train)


@pytest.fixture(scope="module")
def run(lab: Lab) -> Path:
    return lab.train("whole", model={"adapter": ADAPTER})


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 40).unsqueeze(0)).logits


def test_it_learns_and_goes_on_bit_for_bit(run: Path, lab: Lab) -> None:
    loss = column(run, "loss")
    assert loss[-1] < loss[0] - 0.5
    lab.train("stopped", "stop_after=5", expect=75, model={"adapter": ADAPTER})
    lab.resume("stopped")
    assert tiny_run.losses(lab.folder / "stopped") == tiny_run.losses(run)
    for file in (
        "model/adapter_model.safetensors",
        "checkpoint-12/model.safetensors",
        "checkpoint-12/optimizer.safetensors",
    ):
        assert (lab.folder / "stopped" / file).read_bytes() == (run / file).read_bytes()


def test_no_base_weight_is_in_a_checkpoint_or_an_export(run: Path, lab: Lab) -> None:
    trained = {f"{layer}.{part}" for layer in LAYERS for part in PARTS}
    trained |= {f"{module}.modules_to_save.default.weight" for module in SAVED}
    checkpoint, export = run / "checkpoint-12", run / "model"
    assert set(load_file(checkpoint / "model.safetensors")) == trained
    written = {f"base_model.model.{layer}.{part.replace('.default', '')}" for layer in LAYERS for part in PARTS}
    # The tied weight stays one in training; PEFT reads it under both names.
    written |= {f"base_model.model.{module}.weight" for module in (*SAVED, "lm_head")}
    assert set(load_file(export / "adapter_model.safetensors")) == written
    assert not list(export.glob("model*.safetensors"))
    base = [t.numpy().tobytes() for t in load_file(lab.model_path / "model.safetensors").values() if t.ndim == 2]
    for file in [*checkpoint.iterdir(), *export.iterdir()]:
        content = file.read_bytes()
        assert not any(weights in content for weights in base), file


def test_peft_transformers_and_a_merge_say_the_same(run: Path, lab: Lab) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from burnish.model.adapters.lora import without_known_warnings

    code, output = lab.burnish("export", run, "--to", lab.folder / "merged", "--merge")
    assert code == 0, output
    base: Any = AutoModelForCausalLM.from_pretrained(lab.model_path)
    before = logits(base)
    with without_known_warnings():
        in_peft = logits(PeftModel.from_pretrained(base, run / "model"))
        in_transformers = logits(AutoModelForCausalLM.from_pretrained(run / "model"))
    merged: Any = AutoModelForCausalLM.from_pretrained(lab.folder / "merged")
    assert merged.config.tie_word_embeddings
    torch.testing.assert_close(in_transformers, in_peft, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(merged), in_peft, rtol=0, atol=1e-5)
    assert (in_peft - before).abs().max() > 0.1


def test_the_head_alone_of_a_tied_pair(lab: Lab) -> None:
    """Its merge is a model whose embedding and head are two weights."""
    from transformers import AutoModelForCausalLM

    run = lab.train("head", model={"adapter": {"type": "lora", "r": 4, "target_modules": ["q_proj", "lm_head"]}})
    code, output = lab.burnish("export", run, "--to", lab.folder / "untied", "--merge")
    assert code == 0, output
    assert json.loads((lab.folder / "untied" / "config.json").read_text())["tie_word_embeddings"] is False
    untied: Any = AutoModelForCausalLM.from_pretrained(lab.folder / "untied")
    base: Any = AutoModelForCausalLM.from_pretrained(lab.model_path)
    assert torch.equal(untied.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert not torch.equal(untied.lm_head.weight, base.lm_head.weight)
