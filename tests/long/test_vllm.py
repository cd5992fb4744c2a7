"""Exports load in vLLM, which gives every token the log-probability that transformers and PEFT give it.

vLLM answers in the environment that `make .vllm` makes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.cli import main
from burnish.mesh import open_mesh
from burnish.model.adapters.lora import LoRA
from burnish.model.config import ModelConfig
from burnish.model.export import export
from burnish.model.load import load_model
from tests import tiny_run
from tests.tiny_models import tiny_model
from tests.vllm_helpers import HEAD_DIM, needs_vllm, run_with_vllm

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(600),  # a start of vLLM takes 20 s on two free cores, and 100 s when its files are cold
    needs_vllm,
]
DRIFT = 1e-4
"""Largest difference of a log-probability in float32: measured up to 1.3e-5 here, 3.4e-5 with SmolLM2-135M."""
MOVED = 0.1
"""Training must have changed some log-probability by more: the base model's weights fail the comparison."""


@dataclass(frozen=True)
class Export:
    """A folder to prove, and the model it was trained from."""

    folder: Path
    base: Path
    is_adapter: bool = False

    def reference(self) -> Any:
        from peft import PeftModel

        if self.is_adapter:
            return PeftModel.from_pretrained(load(self.base), self.folder).eval()
        return load(self.folder)

    def ask_vllm(self, prompts: list[list[int]], messages: list[dict[str, str]]) -> dict[str, Any]:
        model, adapter = (self.base, str(self.folder)) if self.is_adapter else (self.folder, None)
        request, answer = self.folder.with_suffix(".request.json"), self.folder.with_suffix(".answer.json")
        request.write_text(
            json.dumps({"model": str(model), "adapter": adapter, "prompts": prompts, "messages": messages})
        )
        run_with_vllm(["-m", "tests.long.ask_vllm", str(request), str(answer)], seconds=540)
        return json.loads(answer.read_text())


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    # Eager attention: transformers' SDPA path leaves out the soft cap of Gemma 2.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def logits(model: Any, ids: list[int]) -> Tensor:
    """[T - 1, V]: row t is what the model predicts token t + 1 from."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]


def logprobs(model: Any, ids: list[int]) -> Tensor:
    return logits(model, ids).log_softmax(-1).gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)


def compare(exported: Export, answer: dict[str, Any]) -> None:
    """Every log-probability that vLLM gave, and every token it chose greedily, against transformers."""
    model, base = exported.reference(), load(exported.base)
    drift, moved, count = 0.0, 0.0, 0
    for said in [*answer["sampled"], *answer["greedy"], answer["chat"]]:
        ids = said["prompt"] + said["completion"]
        given = torch.tensor(said["prompt_logprobs"] + said["logprobs"])
        expected = logprobs(model, ids)[-len(given) :]
        drift = max(drift, (given - expected).abs().max().item())
        moved = max(moved, (expected - logprobs(base, ids)[-len(given) :]).abs().max().item())
        count += len(given)
    print(f"{count} log-probabilities: at most {drift:.1e} from transformers', training moved one by {moved:.2f}")
    assert drift < DRIFT
    assert moved > MOVED
    for said in [*answer["greedy"], answer["chat"]]:
        best = logits(model, said["prompt"] + said["completion"]).argmax(-1)
        assert best[len(said["prompt"]) - 1 :].tolist() == said["completion"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Export]:
    """A tiny Llama, trained whole by `burnish train`, then the export of that with LoRA, exported in both ways."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("vllm")
    start = folder / "start"
    tiny_model("llama", vocab_size=320, hidden_size=64, head_dim=HEAD_DIM, eos_token_id=0, scale=0.5).save_pretrained(
        start
    )
    tiny_run.write_tokenizer(start)
    # That an answer ends with <|im_end|> is now known to the chat template alone.
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(start)
    (start / "generation_config.json").write_text('{"eos_token_id": 0}')
    rows = tiny_run.write_jsonl(folder / "train.jsonl", tiny_run.conversations(200))

    def burnish(*arguments: str) -> None:
        assert main(list(arguments)) == 0

    def train(name: str, model: dict[str, Any], num_steps: int) -> str:
        blocks = tiny_run.recipe(start, rows, folder / name, model=model, num_steps=num_steps)
        burnish("train", str(tiny_run.write_recipe(folder / f"{name}.yaml", blocks)))
        return str(folder / name)

    full, merged, adapter = (folder / name for name in ("full", "merged", "adapter"))
    burnish("export", train("full-run", {"path": str(start)}, num_steps=80), "--to", str(full))
    lora_run = train("lora-run", {"path": str(full), "adapter": {"type": "lora", "r": 4}}, num_steps=40)
    burnish("export", lora_run, "--merge", "--to", str(merged))
    burnish("export", lora_run, "--to", str(adapter))
    return {
        "full": Export(full, base=start),
        "merged": Export(merged, base=full),
        "adapter": Export(adapter, base=full, is_adapter=True),
    }


@pytest.mark.parametrize("kind", ["full", "merged", "adapter"])
def test_vllm_says_what_a_run_was_trained_to_say(runs: dict[str, Export], kind: str) -> None:
    from transformers import AutoTokenizer

    exported = runs[kind]
    tokenizer = AutoTokenizer.from_pretrained(exported.folder)
    conversations = [row["messages"][:1] for row in tiny_run.conversations(4, seed=7)]
    prompts = [
        tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        for turns in conversations
    ]
    answer = exported.ask_vllm(prompts, conversations[0])
    compare(exported, answer)
    # The export's chat template and its stopping token, as vLLM reads them from the folder.
    assert answer["chat"]["prompt"] == prompts[0]
    assert answer["chat"]["finish_reason"] == "stop"
    assert tokenizer.decode(answer["chat"]["completion"][-1:]) == "<|im_end|>"


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": HEAD_DIM},
    "qwen3_moe": {"head_dim": HEAD_DIM},
    "gemma2": {"head_dim": HEAD_DIM, "query_pre_attn_scalar": HEAD_DIM},
    "gemma3": {"head_dim": HEAD_DIM, "query_pre_attn_scalar": HEAD_DIM},
    "gpt_neox": {"hidden_size": 4 * HEAD_DIM},
}
"""Without gpt-oss, whose experts vLLM has no CPU kernel for."""


@pytest.mark.parametrize(
    ("family", "adapter"),
    # vLLM wraps the experts for any adapter of a mixture, and computes those with Triton only.
    [*((family, None) for family in FAMILIES), ("qwen3", LoRA(r=4)), ("gemma2", LoRA(r=4)), ("gpt_neox", LoRA(r=4))],
    ids=[*FAMILIES, "qwen3-lora", "gemma2-lora", "gpt_neox-lora"],
)
def test_vllm_loads_every_family(family: str, adapter: LoRA | None, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = tmp_path / "base"
    # 331: a vocabulary that is padded for training, and cut when it is written.
    tiny_model(family, vocab_size=331, **FAMILIES[family]).save_pretrained(base)
    tiny_run.write_tokenizer(base)
    with open_mesh("cpu") as mesh:
        model = load_model(ModelConfig(path=str(base), adapter=adapter), mesh, seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in model.trainable_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        model.head.weight[model.vocab_size :] = 0
    exported = Export(tmp_path / "out", base, is_adapter=adapter is not None)
    export(model, AutoTokenizer.from_pretrained(base), exported.folder, merge=False, base_path=str(base))
    messages = [{"role": "user", "content": "turn around: red green"}]
    compare(exported, exported.ask_vllm([[1, 5, 60, 17, 44, 44, 90, 3, 8, 71], [1, 330, 33]], messages))
