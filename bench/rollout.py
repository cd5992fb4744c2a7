"""Sampling rollouts: the embedded engine beside transformers' `generate` and its continuous batching.

    python -m bench rollout

Four prompts, eight rollouts of each, at temperature 1, by a Llama of hidden size 256 with 6 layers and 8,192 words, no
stop tokens. `even`: each rollout is 64 tokens long; `long tail`: their lengths are log-normal, and `generate`, which
knows no lengths, runs the batch to the longest and is credited with the tokens that were wanted; continuous batching is
told each length, as we are. The three take turns, in CPU seconds of one thread (robust to other load); the best round
counts. Tokens are random, so no engine finds anything else to share than the prompts.
"""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from bench.report import report
from burnish.model.config import ModelConfig
from burnish.model.policy_model import PolicyModel, one_document
from burnish.rollout.engine import EngineSetup
from burnish.rollout.engines.embedded import Embedded
from burnish.rollouts import Completion, Request, SamplingParams

NUM_PROMPTS, GROUP, EVEN, VOCABULARY, ROUNDS = 4, 8, 64, 8192, 3


def plain(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).eval()


class Noted:
    """The policy's own weights, as version 0."""

    version, digest, adapter_only = 0, "", False


def requests(prompt: int, lengths: list[int]) -> list[Request]:
    """`GROUP` requests for each of `NUM_PROMPTS` random prompts."""
    draw = np.random.default_rng(prompt).integers
    prompts = [draw(1, VOCABULARY, prompt).tolist() for _ in range(NUM_PROMPTS)]
    return [
        Request(f"{i}", prompts[i // GROUP], i, SamplingParams(max_new_tokens=length))
        for i, length in enumerate(lengths)
    ]


def embedded(engine: Any, asked: list[Request]) -> list[Completion]:
    engine.submit(asked)
    done: list[Completion] = []
    while engine.num_unfinished:
        done += engine.step()
    return done


def generate(model: Any, asked: list[Request]) -> None:
    longest = max(request.params.max_new_tokens for request in asked)
    ids = torch.tensor([request.prompt_ids for request in asked])
    model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=longest)


def continuous(model: Any, asked: list[Request]) -> None:
    """`generate_batch`, with as many blocks as hold all requests: by itself it takes the memory of the host."""
    tokens = sum(len(request.prompt_ids) + request.params.max_new_tokens for request in asked)
    blocks = ContinuousBatchingConfig(page_size=32, num_blocks=tokens // 32 + 2 * len(asked), max_batch_tokens=2048)
    config = GenerationConfig(do_sample=True, max_new_tokens=EVEN, eos_token_id=-1, pad_token_id=0)
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=blocks
    ) as manager:
        for request in asked:
            manager.add_request(
                request.prompt_ids, request_id=request.request_id, max_new_tokens=request.params.max_new_tokens
            )
        finished = 0
        while finished < len(asked):
            result = manager.get_result(timeout=60)
            assert result is not None, "no result within a minute"
            finished += result.is_finished()


def largest_error(model: PolicyModel, asked: list[Request], done: list[Completion]) -> float:
    """Of the engine's log-probabilities, against the policy's over the finished rollout."""
    by_id = {request.request_id: request for request in asked}
    worst = 0.0
    for each in done:
        prompt = by_id[each.request_id].prompt_ids
        block = one_document(torch.tensor(prompt + each.token_ids))
        with torch.no_grad():
            expected = model(block, needs=frozenset({"logprobs"}), reads=block.loss_mask).logprobs[len(prompt) :]
        worst = max(worst, (expected - torch.tensor(each.logprobs)).abs().max().item())
    return worst


def measure(kind: str, prompt: int, lengths: list[int]) -> dict[str, Any]:
    policy, beside, paged = PolicyModel.from_hf(plain("sdpa")), plain("sdpa"), plain("sdpa")
    setup = EngineSetup(ModelConfig(path="fresh"), 0, None, 2048, (), "", 1.0)
    engine = Embedded().open(setup, policy)
    asked = requests(prompt, lengths)
    done: list[Completion] = []

    def ours() -> None:
        engine.update_weights(Noted())  # nothing of the round before is shared
        done[:] = embedded(engine, asked)

    best = {"embedded": 1e9, "generate": 1e9, "continuous": 1e9}
    for _ in range(ROUNDS):
        for name, run in (
            ("embedded", ours),
            ("generate", lambda: generate(beside, asked)),
            ("continuous", lambda: continuous(paged, asked)),
        ):
            started = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - started)
    facts, tokens = engine.facts(), sum(lengths)
    return {
        "lengths": kind,
        "prompt": prompt,
        "tokens": tokens,
        **{f"{name} tokens/s": tokens / seconds for name, seconds in best.items()},
        "over generate": best["generate"] / best["embedded"],
        "over continuous": best["continuous"] / best["embedded"],
        "prompt shared": facts["prompt_tokens_shared"] / facts["prompt_tokens"],
        "error": largest_error(policy, asked, done),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    count = NUM_PROMPTS * GROUP
    tail = np.random.default_rng(0).lognormal(3.7, 0.8, count).clip(4, 400).astype(int).tolist()
    rows = [measure("even", prompt, [EVEN] * count) for prompt in (32, 256)]
    report("rollout", [*rows, measure("long tail", 64, tail)])


if __name__ == "__main__":
    main()
