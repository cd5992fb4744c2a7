"""A pair's prompt computed once or once for each answer: forward and backward of a small model over packed pairs.

    python -m bench.shared_prompt

Eight pairs with answers of 50 tokens, in one row, through a Llama of hidden size 256 with 4 layers and 8,192 words. The
two are timed in turns, in CPU seconds of one thread (robust to other load), and the best of the rounds counts.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.report import report
from burnish.data.packing.layout import layout
from burnish.data.rendering.share import with_shared_prompt
from burnish.model.policy_model import PolicyModel
from burnish.types import Block, Group, Sample

NUM_PAIRS, ANSWER, VOCAB_SIZE, ROUNDS = 8, 50, 8192, 5


def policy() -> PolicyModel:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    torch.manual_seed(0)
    return PolicyModel.from_hf(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def pairs(prompt: int) -> list[list[Sample]]:
    """Pairs of random tokens; the two answers follow the same prompt and are trained."""
    draw = np.random.default_rng(prompt).integers
    found = []
    for number in range(NUM_PAIRS):
        before = draw(0, VOCAB_SIZE, prompt)
        trained = np.arange(prompt + ANSWER) >= prompt
        answers = [np.concatenate([before, draw(0, VOCAB_SIZE, ANSWER)]).astype(np.int32) for _ in range(2)]
        found.append([Sample(answer, trained, str(number)) for answer in answers])
    return found


def row(groups: list[Group]) -> Block:
    return layout(groups, sum(map(len, groups)), 3 * NUM_PAIRS)


def seconds(model: PolicyModel, block: Block) -> tuple[float, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    started = time.process_time()
    logprobs = model(block, needs=frozenset({"logprobs"}), reads=block.loss_mask).logprobs
    logprobs.sum().backward()
    return time.process_time() - started, logprobs.detach()[block.loss_mask]


def measure(model: PolicyModel, prompt: int) -> dict[str, Any]:
    apart = row([Group(tuple(samples)) for samples in pairs(prompt)])
    shared = row([Group(with_shared_prompt(samples, 0)) for samples in pairs(prompt)])
    rounds = [[seconds(model, block) for block in (apart, shared)] for _ in range(ROUNDS)]
    best = [min(pair[i][0] for pair in rounds) for i in range(2)]
    return {
        "prompt": prompt,
        "answer": ANSWER,
        "tokens_apart": apart.num_tokens,
        "tokens_shared": shared.num_tokens,
        "apart_ms": best[0] * 1e3,
        "shared_ms": best[1] * 1e3,
        "speedup": best[0] / best[1],
        "error": (rounds[0][0][1] - rounds[0][1][1]).abs().max().item(),
    }


def main() -> None:
    torch.set_num_threads(1)
    model = policy()
    report("shared_prompt", [measure(model, prompt) for prompt in (16, 30, 100, 300)])


if __name__ == "__main__":
    main()
