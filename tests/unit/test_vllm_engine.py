"""What a recipe may say of vLLM, and what is refused, without vLLM."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from burnish.errors import UserError
from burnish.model.adapters.lora import LoRA
from burnish.model.adapters.qlora import QLoRA
from burnish.model.config import ModelConfig
from burnish.rollout.engine import EngineSetup
from burnish.rollout.engines.vllm import VLLM
from burnish.rollout.vllm_extension import PolicyWeights
from burnish.rollout.vllm_files import located, write_adapter
from burnish.rollout.vllm_live import LiveVLLM
from burnish.types import NewTokens
from tests.engine_helpers import HandWeights
from tests.tiny_models import tiny_config


def setup(new_tokens: NewTokens | None = None, **model: Any) -> EngineSetup:
    return EngineSetup(ModelConfig(**{"path": "some/model", **model}), 0, new_tokens, 64, (2,), "", 1.0)


@pytest.mark.parametrize(
    ("adapter", "taken"),
    [
        (LoRA(), True),
        (LoRA(r=512, use_rslora=True, target_modules=["q_proj", "v_proj"]), True),
        (LoRA(r=513), False),
        (LoRA(use_dora=True), False),
        (LoRA(modules_to_save=["norm"]), False),
        (LoRA(target_modules=["q_proj", "embed_tokens"]), False),
        (LoRA(target_modules=r"model\.layers\.\d+\.mlp\..*|lm_head"), False),
        (QLoRA(), False),
        (None, False),
    ],
)
def test_adapters_that_vllm_applies_itself(adapter: LoRA | None, taken: bool):
    assert VLLM().takes_adapter(setup(adapter=adapter)) is taken
    assert not VLLM(enable_lora=False).takes_adapter(setup(adapter=adapter))
    assert not VLLM().takes_adapter(setup(NewTokens(96, ((1,),)), adapter=adapter))
    refused = list(VLLM(enable_lora=True).refuse(setup(adapter=adapter)))
    assert [reason[:12] for reason in refused] == ([] if taken else ["enable_lora:"])


@pytest.mark.parametrize("name", ["seed", "logprobs_mode", "async_scheduling", "max_num_seqs", "max_model_len"])
def test_what_the_run_knows_is_no_further_argument(name: str):
    with pytest.raises(ValidationError, match=f"engine_args: {name}: a field of the engine, or known from the run"):
        VLLM(engine_args={name: 1, "block_size": 64})


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_it_says_how_to_install_it():
    with pytest.raises(UserError, match="vLLM cannot be imported") as caught:
        VLLM().open(setup())
    assert caught.value.where == "workflow.rollout.engine"
    assert "scripts/install_vllm_cpu" in caught.value.cure


def test_it_refuses_the_process_that_the_policy_trains_in():
    model: Any = object()
    with pytest.raises(UserError, match="cannot live where the policy trains") as caught:
        VLLM().open(setup(), model)
    assert "workers: {type: processes}" in caught.value.cure


def test_a_model_that_has_no_folder_is_described_in_one(tmp_path: Path):
    fresh = {"model_type": "llama", "vocab_size": 96, "hidden_size": 64, "num_attention_heads": 2}
    described = located(setup(path=None, config=fresh), tmp_path)
    assert described == {"model": str(tmp_path), "trust_remote_code": False, "skip_tokenizer_init": True}
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert (written["vocab_size"], written["hidden_size"]) == (96, 64)


def test_new_tokens_make_the_model_larger(tmp_path: Path):
    tiny_config("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text("{}")
    grown = dataclasses.replace(
        setup(NewTokens(94, ((), (), (), ())), path=str(tmp_path / "base")), tokenizer_path=str(tmp_path / "tokenizer")
    )
    described = located(grown, tmp_path / "own")
    assert described["model"] == described["tokenizer"] == str(tmp_path / "own")
    assert json.loads((tmp_path / "own" / "config.json").read_text())["vocab_size"] == 98  # 94 and 4; it had 96
    assert (tmp_path / "own" / "tokenizer_config.json").read_text() == "{}"
    plain = located(dataclasses.replace(grown, new_tokens=None), tmp_path / "other")
    assert plain["model"] == str(tmp_path / "base")


def test_an_adapter_is_written_as_peft_would(tmp_path: Path):
    name = "model.layers.0.self_attn.{}.lora_{}.default.weight"
    tensors = [(name.format("q_proj", "A"), torch.ones(4, 8)), (name.format("v_proj", "B"), torch.ones(2, 8).T)]
    write_adapter(LoRA(r=4, lora_alpha=8, use_rslora=True), tensors, tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (4, 8),
        "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight": (8, 2),
    }
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj"],
    }


class FailsToStart:
    """vLLM's `LLMEngine`, where it raises."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def from_engine_args(self, arguments: Any) -> Any:
        raise self.error


def test_what_vllm_says_of_a_configuration_is_for_a_person_and_anything_else_may_pass():
    with pytest.raises(UserError, match="vLLM does not start: ValueError: no room for 64 tokens") as caught:
        VLLM()._start(FailsToStart(ValueError("no room\n for 64 tokens")), None)
    assert caught.value.where == "workflow.rollout.engine"
    for passing in (torch.OutOfMemoryError("2 GiB"), OSError("the port is taken"), AssertionError("peak memory")):
        with pytest.raises(type(passing)) as raised:
            VLLM()._start(FailsToStart(passing), None)
        assert raised.value is passing


def test_layers_of_an_adapter_that_vllm_does_not_have_are_named():
    fused, o, experts = (f"language_model.model.layers.0.{name}" for name in ("qkv_proj", "o_proj", "mlp.experts"))
    held = {fused, o, experts, f"{experts}.base_layer", "model.layers.1.self_attn.o_proj", "model.layers.0.o_proj"}
    manager = SimpleNamespace(
        modules=dict.fromkeys((fused, o, experts)), get_adapter={3: SimpleNamespace(loras=dict.fromkeys(held))}.get
    )
    worker = PolicyWeights()
    worker.model_runner = SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=manager))
    assert worker.lost_layers(3) == ["model.layers.0.o_proj", "model.layers.1.self_attn.o_proj"]


class Recorded:
    """vLLM's `LLMEngine` as far as sleep and a whole model's weights go, and what it was told."""

    def __init__(self) -> None:
        facts = {"logprobs_mode": "processed_logprobs", "enable_sleep_mode": True, "get_vocab_size": lambda: 96}
        parallel = SimpleNamespace(world_size=1)
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(**facts), parallel_config=parallel)
        self.told: list[str] = []

    def sleep(self, level: int) -> None:
        self.told.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.told.append(f"wake {tags}")

    def collective_rpc(self, name: str, args: tuple[Any, ...]) -> list[str]:
        self.told.append(f"{name} of {len(list(args[0]))}")
        return [""]

    def reset_prefix_cache(self, reset_running_requests: bool) -> None:
        self.told.append("reset")


def test_the_cache_comes_back_behind_the_new_weights(tmp_path: Path):
    engine = Recorded()
    live = LiveVLLM(engine, setup(), tmp_path, False, on_close=lambda: None)
    live.sleep()
    live.wake()
    live.update_weights(HandWeights(4))
    assert engine.told == ["sleep 1", "wake ['weights']", "take_policy of 2", "wake ['kv_cache']", "reset"]
    live.sleep()
    live.wake()
    live.sleep()  # no weights came: it must be awake as a whole to sleep as a whole
    assert engine.told[5:] == ["sleep 1", "wake ['weights']", "wake ['kv_cache']", "sleep 1"]
