"""What vLLM makes of an export: `python -m tests.long.ask_vllm REQUEST ANSWER`, two JSON files.

A process of its own, because vLLM sets threads, the process group and warnings for the whole process.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
MAX_TOKENS = 24


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Greedy and sampled continuations of `prompts` (lists of token ids) and a chat's, with processed log-probabilities
    at temperature 1. `model` is a folder; `adapter`, a PEFT folder for it, may be absent."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    adapter = request.get("adapter")
    llm = LLM(
        request["model"],
        tokenizer=adapter or request["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=8,
        logprobs_mode="processed_logprobs",
        enable_lora=adapter is not None,
        disable_log_stats=True,
    )
    lora = LoRARequest("adapter", 1, adapter) if adapter else None
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    # With an adapter, vLLM 0.32 fails on prompt log-probabilities: its LoRA head has one row a sequence, not a token.
    prompt_logprobs = None if adapter else 0
    sampled = SamplingParams(
        temperature=1.0, seed=0, max_tokens=MAX_TOKENS, logprobs=0, prompt_logprobs=prompt_logprobs
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, logprobs=0)
    return {
        "sampled": [told(out) for out in llm.generate(prompts, sampled, lora_request=lora, use_tqdm=False)],
        "greedy": [told(out) for out in llm.generate(prompts, greedy, lora_request=lora, use_tqdm=False)],
        "chat": told(llm.chat(request["messages"], greedy, lora_request=lora, use_tqdm=False)[0]),
    }


def told(output: Any) -> dict[str, Any]:
    """Token ids of prompt and completion, and the log-probability of each but the very first."""
    completion = output.outputs[0]
    pairs = list(zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=False))[1:]
    return {
        "prompt": list(output.prompt_token_ids),
        "completion": list(completion.token_ids),
        "prompt_logprobs": [entry[token].logprob for token, entry in pairs],
        "logprobs": [entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs)],
        "finish_reason": completion.finish_reason,
    }


if __name__ == "__main__":
    os.environ.update(SETTINGS)
    request = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(answer(request)))
