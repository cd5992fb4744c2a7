"""Engines under test: weights by hand, requests, and what the policy says of the same tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.model.config import ModelConfig
from burnish.model.policy_model import PolicyModel, one_document
from burnish.rollout.engine import EngineSetup, LiveEngine
from burnish.rollout.weights import digest_of
from burnish.rollouts import Completion, Request, SamplingParams

VOCABULARY = 96


class HandWeights:
    """A version that needs no transport; see `Weights`."""

    adapter_only = False

    def __init__(self, version: int, named: Sequence[tuple[str, Tensor]] | None = None) -> None:
        self.version = version
        self._named = [("a", torch.ones(2)), ("b", torch.full((3,), 2.0))] if named is None else list(named)
        self.digest = digest_of(self._named)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._named

    def folder(self) -> Path:
        raise AssertionError("nobody wrote one")


def setup(max_length: int = 64, stop_token_ids: tuple[int, ...] = (), tokenizer: str = "", **model: Any) -> EngineSetup:
    config = ModelConfig.model_validate(model or {"path": "unread"})
    return EngineSetup(config, 0, None, max_length, stop_token_ids, tokenizer, 1.0)


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def asked(prompt: list[int], seed: int, max_new_tokens: int = 8, **params: Any) -> Request:
    sampling = SamplingParams(max_new_tokens=max_new_tokens, **params)
    return Request(f"{len(prompt)}.{seed}.{max_new_tokens}", prompt, seed, sampling)


def finish(engine: LiveEngine, requests: Sequence[Request] = ()) -> dict[str, Completion]:
    engine.submit(requests)
    found: dict[str, Completion] = {}
    for _ in range(10_000):
        if not engine.num_unfinished:
            return found
        found |= {completion.request_id: completion for completion in engine.step()}
    raise AssertionError("10,000 steps, and not finished")


def policy_logprobs(
    model: PolicyModel, prompt: list[int], token_ids: list[int], temperature: float | None = None
) -> list[float]:
    """Of a completion's tokens, by the policy's forward pass over the finished rollout.

    Args:
        temperature: absent: the model's own.
    """
    block, own = one_document(torch.tensor(prompt + token_ids)), model.temperature
    model.temperature = own if temperature is None else temperature
    with torch.no_grad():
        outputs = model(block, needs=frozenset({"logprobs"}), reads=block.loss_mask)
    model.temperature = own
    return outputs.logprobs[len(prompt) :].tolist()


def largest_error(model: PolicyModel, requests: Sequence[Request], found: dict[str, Completion]) -> float:
    worst = 0.0
    for request in requests:
        each = found[request.request_id]
        expected = policy_logprobs(model, request.prompt_ids, each.token_ids)
        assert len(expected) == len(each.logprobs) > 0
        worst = max([worst, *(abs(a - b) for a, b in zip(each.logprobs, expected, strict=True))])
    return worst
