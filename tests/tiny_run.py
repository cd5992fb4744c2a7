"""A whole run in seconds: a tiny Llama folder with its tokenizer, conversations to train it on, and a recipe."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = [
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "four",
    "cat",
    "dog",
    "bird",
    "sun",
    "moon",
    "tree",
    "river",
    "stone",
]


def conversations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions whose answer repeats their words backwards: short, learnable, of uneven lengths."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.randint(1, 9))
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": "turn around: " + " ".join(words)},
                    {"role": "assistant", "content": " ".join(reversed(words))},
                ]
            }
        )
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 320 entries with the ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS), "user assistant system turn around:"], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|im_start|>"
    )
    wrapped.chat_template = CHATML
    wrapped.save_pretrained(folder)


def write_model(folder: Path, *, seed: int = 0) -> Path:
    """A two-layer Llama of 40 thousand parameters and its tokenizer, as a Hugging Face folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def recipe(model_path: Path, train: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of 12 steps that saves every 4; `changes` replace top-level blocks."""
    blocks: dict[str, Any] = {
        "workflow": {"type": "sft"},
        "model": {"path": str(model_path)},
        "data": {
            "train": [{"type": "jsonl", "path": str(train)}],
            "max_length": 64,
            "packing": {"type": "best_fit", "row_length": 128, "lanes": 4, "open_bins": 4},
        },
        "optimizer": {"type": "adamw", "learning_rate": 3e-3},
        "schedule": {"type": "cosine", "warmup_steps": 2},
        "global_batch_size": 2,
        "micro_batch_size": 1,
        "num_steps": 12,
        "checkpoint": {"save_every": 4, "keep": 2},
        "seed": 0,
        "run_dir": str(run_dir),
    }
    return blocks | changes


def write_recipe(path: Path, blocks: dict[str, Any]) -> Path:
    """JSON is YAML 1.2."""
    path.write_text(json.dumps(blocks, indent=1))
    return path


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl`, one dictionary a step."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    """(step, loss, grad_norm): what an undisturbed and a resumed run must share to the last bit."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(run_dir) if "loss" in line]
