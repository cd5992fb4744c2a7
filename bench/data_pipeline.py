"""Files to packed rows, against nothing but the tokenizer on the same texts, side by side.

    python -m bench.data_pipeline

Rows are conversations about the source code of Python's standard library, through a chat template, with masks, cut and
packed by a run's own stream. The yardstick is `encode_batch` of the same texts, ready rendered, in batches of the same
size. Both in one process, in turns; the tokenizer (a byte-level BPE of 32,768 entries trained here on the same sources)
with one thread and with one a core.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

from bench.report import report

NUM_ROWS = 5000
ROUNDS = 3
VOCABULARY = 32_768
TRAINED_ON = 4_000_000
"""Characters that the tokenizer is trained on."""
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(Path(folder))
        rows = []
        for threads in ("1", str(len(os.sched_getaffinity(0)))):
            # Tokenizers reads this once, so each setting is measured in a process of its own.
            os.environ["RAYON_NUM_THREADS"] = threads
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows += pool.apply(measure, (folder, int(threads)))
    report("data_pipeline", rows)


def measure(folder: str, threads: int) -> list[dict[str, Any]]:
    """Rates of the tokenizer alone and of the whole stream, by turns."""
    from transformers import AutoTokenizer

    from burnish.data.config import DataConfig
    from burnish.data.lane import MAX_ROWS

    path = Path(folder) / "train.jsonl"
    conversations = write_rows(path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations]
    batches = [texts[start : start + MAX_ROWS] for start in range(0, len(texts), MAX_ROWS)]
    settings = {"train": [{"type": "jsonl", "path": str(path)}], "max_length": 4096, "over_length": "truncate"}
    data = DataConfig.model_validate(settings)
    live = data.renderer.open(tokenizer)
    backend = tokenizer.backend_tokenizer
    tokens = sum(len(encoding.ids) for batch in batches for encoding in backend.encode_batch(batch))

    blocks = 0
    seconds: dict[str, list[float]] = {"encode_batch": [], "encode_batch_fast": [], "stream": []}
    for _ in range(ROUNDS):
        for name in ("encode_batch", "encode_batch_fast"):
            started = perf_counter()
            for batch in batches:
                getattr(backend, name)(batch, add_special_tokens=False)
            seconds[name].append(perf_counter() - started)
        started = perf_counter()
        blocks = run_stream(data, live)
        seconds["stream"].append(perf_counter() - started)
    return [
        {
            "what": {"stream": f"rows to packed blocks ({blocks})"}.get(name, f"tokenizer alone: {name}"),
            "tokenizer_threads": threads,
            "tokens": tokens,
            "mtok_per_second": tokens / statistics.median(times) / 1e6,
            "over_encode_batch": statistics.median(
                bare / ours for bare, ours in zip(seconds["encode_batch"], times, strict=True)
            ),
            "goal": ">= 0.95" if name == "stream" else "",
        }
        for name, times in seconds.items()
    ]


def run_stream(data: Any, live: Any) -> int:
    """One epoch of packed rows; returns how many."""
    from burnish.data.stream import open_stream

    stream = open_stream(data, live, seed=0, num_epochs=1)
    blocks = 0
    while taken := stream.take(8):
        blocks += len(taken)
    stream.close()
    return blocks


def sources() -> Iterator[str]:
    """Source files of the standard library, without its tests, in order of name."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if not {"test", "tests", "site-packages", "idlelib"} & set(path.parts):
            yield path.read_text(errors="ignore")


def train_tokenizer(folder: Path) -> None:
    """A byte-level BPE with Qwen's split into words and a ChatML template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "".join(sources())[:TRAINED_ON]
    tokenizer.train_from_iterator([text[at : at + 10_000] for at in range(0, len(text), 10_000)], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|im_start|>"
    )
    wrapped.chat_template = CHATML
    wrapped.save_pretrained(folder)


def write_rows(path: Path) -> list[list[dict[str, str]]]:
    """Conversations of two or four turns, about 700 tokens: a piece of a file is shown, and the next is the answer."""
    text = "".join(sources())
    conversations, at, size = [], 0, 0
    with path.open("w") as file:
        for number in range(NUM_ROWS):
            messages = []
            for turn in range(2 + number % 2 * 2):
                size = 200 + (number * 7919 + turn * 104_729) % 2000  # 200 to 2,200 characters, in no order
                messages.append(
                    {"role": ("user", "assistant")[turn % 2], "content": text[at : at + size].strip() or "pass"}
                )
                at += size
            conversations.append(messages)
            file.write(json.dumps({"messages": messages}) + "\n")
    return conversations


if __name__ == "__main__":
    main()
