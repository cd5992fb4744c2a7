"""Exports are read back by plain transformers and PEFT, and say what the trained model says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from burnish.errors import RunFailed
from burnish.mesh import open_mesh
from burnish.model.adapters.lora import LoRA
from burnish.model.config import ModelConfig
from burnish.model.export import end_of_turn_id, export
from burnish.model.load import load_model
from burnish.model.policy_model import PolicyModel, one_document
from tests import tiny_run
from tests.tiny_models import tiny_model

IDS = torch.tensor([5, 60, 1, 17, 44, 44, 90, 3, 8, 71])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_run.write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def base(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A Hugging Face folder of a tiny model whose vocabulary, 131, gets padded."""
    folder = tmp_path / "base"
    tiny_model(request.param, vocab_size=131).save_pretrained(folder)
    return folder


def load(base: Path, **fields: Any) -> PolicyModel:
    with open_mesh("cpu") as mesh:
        return load_model(ModelConfig(path=str(base), **fields), mesh, seed=0)


def train_a_little(model: PolicyModel) -> None:
    """Moves every trained parameter, and leaves the padding rows at zero as training does."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in model.trainable_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        model.head.weight[model.vocab_size :] = 0


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        if isinstance(model, PolicyModel):
            return model.eval().logits(one_document(IDS))
        return model.eval()(input_ids=IDS.unsqueeze(0), use_cache=False).logits[0]


@pytest.mark.parametrize("base", ["llama", "qwen3", "gemma2", "qwen3_moe", "gpt_neox"], indirect=True)
def test_full_fine_tuning_is_exported_as_a_hugging_face_folder(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = load(base)
    assert model.head.weight.shape[0] == 192
    train_a_little(model)
    report = export(model, tokenizer, tmp_path / "out", merge=False, base_path=str(base))
    reread, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    torch.testing.assert_close(logits(reread), logits(model), rtol=0, atol=1e-4)
    assert report.max_difference < 1e-4 < report.largest_logit
    # The very names that the base model's file has, MoE experts one by one included.
    written, original = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in original.items()}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["dtype"]) == (131, "float32")
    assert config["architectures"] == json.loads((base / "config.json").read_text())["architectures"]


@pytest.mark.parametrize("base", ["llama", "qwen3", "gemma2"], indirect=True)
@pytest.mark.parametrize("merge", [True, False])
def test_lora_is_exported_merged_or_as_a_peft_adapter(base: Path, merge: bool, tokenizer: Any, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = load(base, adapter=LoRA(r=4, lora_alpha=6))
    before = logits(model)
    train_a_little(model)
    export(model, tokenizer, tmp_path / "out", merge=merge, base_path=str(base))
    written = tmp_path / "out" if merge else base
    reread = AutoModelForCausalLM.from_pretrained(written, attn_implementation="eager")
    if not merge:
        reread = PeftModel.from_pretrained(reread, tmp_path / "out")
    assert (logits(model) - before).abs().max() > 0.05
    torch.testing.assert_close(logits(reread), logits(model), rtol=0, atol=1e-4)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists() != merge
    if not merge:
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(base)
        assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (4, 6, True)


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_the_folder_answers_as_training_taught_it(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    template = tiny_run.CHATML.replace("<|im_end|>", "<|endoftext|>")
    export(load(base), tokenizer, tmp_path / "out", merge=True, base_path=str(base), chat_template=template)
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == template
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template
    stops = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    # The model's own (2), the tokenizer's <|im_end|> (2) and the template's <|endoftext|> (0).
    assert stops == [2, 0]


def test_end_of_turn_is_what_the_template_writes_after_an_answer(tokenizer: Any) -> None:
    assert tokenizer.decode([end_of_turn_id(tokenizer, None)]) == "<|im_end|>"
    without = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    assert end_of_turn_id(tokenizer, without) is None


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_an_export_that_says_something_else_is_not_published(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = load(base)
    model.forward_offset = model.causal_lm.lm_head.register_forward_hook(lambda _m, _i, out: out + 1.0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(RunFailed, match="does not give the trained model's logits"):
        export(model, tokenizer, tmp_path / "out", merge=True, base_path=str(base))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_sampling_defaults_of_hub_models_do_not_stop_the_export(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    (base / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 7]}')
    export(load(base), tokenizer, tmp_path / "out", merge=True, base_path=str(base))
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (written["temperature"], written["do_sample"], written["eos_token_id"]) == (0.6, True, [2, 7])


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_bfloat16_masters_are_exported_in_bfloat16(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    with open_mesh("cpu") as mesh:
        model = load_model(ModelConfig(path=str(base), dtype="bfloat16"), mesh, seed=0)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        export(model, tokenizer, tmp_path / "out", merge=True, base_path=str(base))
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_the_command_exports_the_newest_checkpoint_of_a_run(
    tiny_model: Path, tiny_train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    from burnish.cli import main
    from burnish.policy.checkpoint import load_latest

    run_dir = tmp_path / "run"
    adapter = {"type": "lora", "r": 4}
    blocks = tiny_run.recipe(tiny_model, tiny_train, run_dir, num_steps=4)
    blocks["model"] = {"path": str(tiny_model), "adapter": adapter}
    recipe = tiny_run.write_recipe(tmp_path / "recipe.yaml", blocks)
    assert main(["train", str(recipe)]) == 0
    assert main(["export", str(run_dir), "--merge", "--to", str(tmp_path / "out")]) == 0
    assert f"step 4 exported to {tmp_path / 'out'}, re-read: logits differ by at most" in capsys.readouterr().out

    loaded = load_latest(run_dir)
    assert loaded is not None
    adapted = loaded.tensors["model"]
    name = "model.layers.0.mlp.down_proj"
    update = 32 / 4 * adapted[f"{name}.lora_B.default.weight"] @ adapted[f"{name}.lora_A.default.weight"]
    base = load_file(tiny_model / "model.safetensors")[f"{name}.weight"]
    assert update.abs().max() > 1e-3
    merged = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"]
    torch.testing.assert_close(merged, base + update, rtol=0, atol=1e-6)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    assert main(["export", str(run_dir), "--to", str(tmp_path / "out")]) == 2
    assert "the folder exists already" in capsys.readouterr().err
