"""What vLLM makes of an export: `python -m tests.long.ask_vllm REQUEST ANSWER`, two JSON files.

A process of its own, because vLLM sets threads, the process group and loggers for the whole process.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
"""1 GB of cache; the engine in this very process, so that killing it leaves nothing behind."""
MAX_TOKENS = 24


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Sampled and greedy continuations of `prompts` (lists of token ids) and a greedy reply to `messages`.

    `model` is a Hugging Face folder, `adapter` a PEFT folder for it or None. Log-probabilities are those of the
    distribution that is sampled from, at temperature 1.
    """
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    adapter = request["adapter"]
    export = adapter or request["model"]
    llm = LLM(
        request["model"],
        tokenizer=export,
        generation_config=export,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=8,
        logprobs_mode="processed_logprobs",
        enable_lora=adapter is not None,
    )
    lora = LoRARequest("export", 1, adapter) if adapter else None
    # vLLM 0.32 cannot do both: the head of a model with adapters has an adapter index a sequence, not a token.
    prompt_logprobs = None if adapter else 0
    sampled = SamplingParams(max_tokens=MAX_TOKENS, seed=0, logprobs=0, prompt_logprobs=prompt_logprobs)
    greedy = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, logprobs=0)
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    return {
        "sampled": [told(output) for output in llm.generate(prompts, sampled, lora_request=lora)],
        "greedy": [told(output) for output in llm.generate(prompts, greedy, lora_request=lora)],
        "chat": told(llm.chat(request["messages"], greedy, lora_request=lora)[0]),
    }


def told(output: Any) -> dict[str, Any]:
    """Token ids of the prompt and of its completion, and the log-probabilities of both where vLLM gave them; the very
    first token has none."""
    completion = output.outputs[0]
    prompt_logprobs = (output.prompt_logprobs or [])[1:]
    return {
        "prompt": output.prompt_token_ids,
        "completion": list(completion.token_ids),
        "prompt_logprobs": [
            entry[token].logprob for token, entry in zip(output.prompt_token_ids[1:], prompt_logprobs, strict=False)
        ],
        "logprobs": [
            entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)
        ],
        "finish_reason": completion.finish_reason,
    }


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    request_file, answer_file = map(Path, sys.argv[1:])
    answer_file.write_text(json.dumps(answer(json.loads(request_file.read_text()))))
