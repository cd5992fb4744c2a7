"""DPO beside TRL's DPOTrainer: `python -m bench.preference`, about ten minutes, or `--lora`.

The same model, weights, pairs, batches, optimizer and learning rate, in float32 on one thread, without activation
checkpointing: full fine-tuning with a frozen reference, or a LoRA adapter whose reference is the model without it. Each
side runs in a process of its own. `over_mib` is the peak resident set less what policy and optimizer must hold: the
process once its policy is loaded, plus gradients and two moments. Times are CPU
seconds. The losses of all steps are compared. Results: `bench/results/preference.json` and `preference_lora.json`.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.report import report

if TYPE_CHECKING:
    from burnish.model.config import ModelConfig

VOCAB, HIDDEN, LAYERS = 49_152, 256, 4
PAIRS_A_STEP, MAX_LENGTH, ROW_LENGTH = 8, 512, 1024
BETA, LEARNING_RATE = 0.1, 1e-3
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
ADAPTER = "adapter.safetensors"
"""The adapter's first weights, in the folder of the inputs."""
TIMED_FROM = 4
"""Steps before this one warm up allocators and lazy imports."""


def make_inputs(folder: Path, steps: int) -> None:
    """The model with a tokenizer of one word a token, and pairs whose lengths are skewed as answers' are."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<eos>": 0} | {f"w{i}": i for i in range(1, VOCAB)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
    rng = random.Random(0)

    def said(longest: int) -> str:
        length = min(longest, max(4, int(rng.lognormvariate(3.7, 0.9))))
        return " ".join(f"w{rng.randint(1, VOCAB - 1)}" for _ in range(length))

    with (folder / "pairs.jsonl").open("w") as file:
        for _ in range(PAIRS_A_STEP * steps):
            row = {"prompt": said(160), "chosen": " " + said(340), "rejected": " " + said(340)}
            file.write(json.dumps(row) + "\n")


def policy_config(folder: Path, lora: bool) -> ModelConfig:
    from burnish.model.config import ModelConfig

    return ModelConfig.model_validate({"path": str(folder)} | ({"adapter": {"type": "lora", **LORA}} if lora else {}))


def make_adapter(folder: Path) -> None:
    """What Burnish's own adapter begins with, for both."""
    from safetensors.torch import save_file

    from burnish.mesh import open_mesh
    from burnish.model.adapters.weights import adapter_tensors
    from burnish.model.load import load_model
    from burnish.model.shards import gathered

    with open_mesh("cpu") as mesh:
        save_file(gathered(adapter_tensors(load_model(policy_config(folder, True), mesh, seed=0))), folder / ADAPTER)


class Meter:
    """Peak memory beyond policy and optimizer, and the time of the steps that count."""

    def __init__(self, num_trained: int) -> None:
        """
        Args:
            num_trained: parameters of the policy, which is loaded, that gradients and moments are made of.
        """
        self.must_hold = resident_mib() + 3 * 4 * num_trained / 2**20
        self.ends: list[float] = []
        self.losses: list[float] = []

    def step(self, loss: float) -> None:
        self.ends.append(time.process_time())
        self.losses.append(loss)

    def result(self) -> dict[str, Any]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        seconds = self.ends[-1] - self.ends[TIMED_FROM - 1]
        pairs = PAIRS_A_STEP * (len(self.ends) - TIMED_FROM)
        return {"over_mib": peak - self.must_hold, "pairs_per_second": pairs / seconds, "losses": self.losses}


def resident_mib() -> float:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def with_trl(folder: Path, steps: int, lora: bool) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    torch.set_num_threads(1)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapter = load_file(folder / ADAPTER) if lora else {}
    meter = Meter(sum(p.numel() for p in (adapter.values() if lora else model.parameters())))

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                meter.step(logs["loss"])

    config = DPOConfig(
        output_dir=str(folder / "trl"),
        beta=BETA,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        per_device_train_batch_size=PAIRS_A_STEP,
        max_steps=steps,
        max_length=MAX_LENGTH,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    trainer = DPOTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Watch()],
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA) if lora else None,
    )
    if lora:
        set_peft_model_state_dict(trainer.model, adapter)
    trainer.train()
    return meter.result()


def with_burnish(folder: Path, steps: int, lora: bool) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    from burnish.data.packing.base import max_documents
    from burnish.data.packing.best_fit import best_fit_decreasing
    from burnish.data.packing.layout import layout
    from burnish.data.renderers.chat import Chat
    from burnish.data.tokenizers.pretrained import open_tokenizer
    from burnish.losses.dpo import DPO
    from burnish.mesh import open_mesh
    from burnish.model.load import load_model
    from burnish.policy.frozen import Frozen
    from burnish.policy.optimizers.adamw import AdamW
    from burnish.policy.policy import Policy
    from burnish.types import Row, RowFormat

    renderer = Chat().open(open_tokenizer(str(folder)), RowFormat("preference"))
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    rendered = renderer.render([Row(json.loads(line), f"pairs.jsonl:{i}") for i, line in enumerate(lines, 1)])
    groups = [one.group for one in rendered if one.group is not None]
    loss = DPO(beta=BETA)
    with open_mesh("cpu") as mesh:
        model = load_model(policy_config(folder, lora), mesh, seed=0)
        trained = model.trainable_parameters()
        meter = Meter(sum(p.numel() for _, p in trained))
        reference = model if lora else load_model(policy_config(folder, False), mesh, seed=0, frozen=True)
        second = Frozen(reference, mesh, 1, adapter=model.adapter)
        optimizer = AdamW(learning_rate=LEARNING_RATE).open(trained)
        policy = Policy(model, optimizer, mesh=mesh, micro_batch_size=1, max_grad_norm=1.0, second=second)
        for step in range(steps):
            pairs = groups[PAIRS_A_STEP * step : PAIRS_A_STEP * (step + 1)]
            sizes = [(len(pair), len(pair.samples)) for pair in pairs]
            rows = [[pairs[i] for i in row] for row in best_fit_decreasing(sizes, ROW_LENGTH)]
            blocks = [layout(row, ROW_LENGTH, max_documents(ROW_LENGTH)) for row in rows]
            total, count = policy.forward_backward(blocks, loss)["loss"]
            policy.optim_step(LEARNING_RATE)
            meter.step(total / count)
    return meter.result()


SIDES = {"trl": with_trl, "burnish": with_burnish}


def in_a_process(side: str, folder: Path, steps: int, lora: bool) -> dict[str, Any]:
    """What a side measured. What it printed is shown where it fails, and else is not."""
    options = ["--side", side, "--folder", str(folder), "--steps", str(steps), *(["--lora"] if lora else [])]
    ran = subprocess.run(
        [sys.executable, "-m", "bench.preference", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if ran.returncode:
        sys.exit(f"{ran.stdout}\n{side} failed with {ran.returncode}")
    return json.loads((folder / f"{side}.json").read_text())


def compared(trl: dict[str, Any], ours: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a side, and a row of their ratios."""
    rows: list[dict[str, Any]] = [
        {"side": side, "over_mib": round(r["over_mib"]), "pairs_per_second": round(r["pairs_per_second"], 2)}
        for side, r in ((f"trl {version('trl')}", trl), ("burnish", ours))
    ]
    ratios = {
        "side": "burnish / trl",
        "over_mib": round(ours["over_mib"] / trl["over_mib"], 3),
        "pairs_per_second": round(ours["pairs_per_second"] / trl["pairs_per_second"], 2),
        "largest_loss_difference": max(abs(a - b) for a, b in zip(trl["losses"], ours["losses"], strict=True)),
    }
    return [*rows, ratios]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lora", action="store_true", help="train an adapter, not the model")
    parser.add_argument("--steps", type=int, default=20, help=f"more than {TIMED_FROM}")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        result = SIDES[args.side](args.folder, args.steps, args.lora)
        (args.folder / f"{args.side}.json").write_text(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_inputs(folder, args.steps)
        if args.lora:
            make_adapter(folder)
        trl, ours = (in_a_process(side, folder, args.steps, args.lora) for side in SIDES)
    report("preference_lora" if args.lora else "preference", compared(trl, ours))


if __name__ == "__main__":
    main()
