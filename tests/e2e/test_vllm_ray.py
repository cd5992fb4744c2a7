"""recipes/grpo_vllm_ray.yaml with the real vLLM in a real Ray actor: all of it but the size of the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import tiny_run
from tests.e2e_helpers import column, events
from tests.tiny_models import tiny_model
from tests.vllm_helpers import HEAD_DIM, needs_vllm, run_with_vllm

pytestmark = [needs_vllm, pytest.mark.timeout(300)]  # 25 s of a core; 76 s where six others wanted it
LEARNING_RATE = 0.01


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm_ray")
    tiny_model("llama", vocab_size=320, hidden_size=64, head_dim=HEAD_DIM, scale=1.0).save_pretrained(folder / "model")
    tiny_run.write_tokenizer(folder / "model")
    rows = [{"prompt": row["messages"][:1]} for row in tiny_run.conversations(12)]
    prompts = tiny_run.write_jsonl(folder / "prompts.jsonl", rows)
    changes = {
        "model.path": folder / "model",
        "model.adapter": "{type: lora, r: 4}",
        "data.train": f"[{{type: jsonl, path: {prompts}}}]",
        "data.packing.row_length": 512,
        "workflow.rewards": "[{type: regex, pattern: '[aeiou]'}]",
        "workflow.rollout.group_size": 4,
        "workflow.rollout.sampling.max_new_tokens": 12,
        "workflow.rollout.engine.kv_cache_gib": 0.0625,
        "workflow.rollout.alignment": "{every: 1, max_difference: 1e-4}",
        "optimizer.learning_rate": LEARNING_RATE,
        "num_steps": 2,
        "run_dir": folder / "run",
    }
    overrides = [f"{path}={value}" for path, value in changes.items()]
    run_with_vllm(["-m", "burnish", "train", "recipes/grpo_vllm_ray.yaml", *overrides], seconds=280)
    return folder / "run"


def test_vllm_in_a_ray_actor_samples_what_the_policy_trains_on(run_dir: Path):
    assert json.loads((run_dir / "recipe.json").read_text())["workflow"]["rollout"]["max_policy_lag"] == 1
    assert column(run_dir, "prompts_trained") == [4, 4]
    # 4 prompts of 4 rollouts of up to 12 tokens, of which some end by themselves.
    assert all(100 < count <= 4 * 4 * 12 for count in column(run_dir, "tokens"))
    assert max(column(run_dir, "lag_max")) <= 1
    assert len(events(run_dir, "rollout_worker_started")) == 1


def test_only_the_adapter_travels_and_vllm_computes_with_it(run_dir: Path):
    trained = load_file(run_dir / "model" / "adapter_model.safetensors")
    assert column(run_dir, "sync_bytes") == [sum(tensor.nbytes for tensor in trained.values())] * 2
    # B begins at zero. Adam's first step moves each weight by the learning rate; the probe of step 2 comes after it.
    moved = max(tensor.abs().max().item() for name, tensor in trained.items() if "lora_B" in name)
    assert moved > 0.5 * LEARNING_RATE and min(column(run_dir, "grad_norm")) > 0
    assert len(column(run_dir, "probe/max_difference")) == 2
    assert max(column(run_dir, "probe/max_difference")) < 1e-4
    # What the first step trained on was drawn by the weights that it was measured with.
    assert column(run_dir, "mismatch/max_difference")[0] < 1e-4
