"""Puts vLLM through an engine's contract: `python -m tests.long.conform_vllm MODEL full|adapter`.

The last line that it prints is one JSON object. A process of its own, as in `ask_vllm.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.errors import SyncFailed, UserError
from burnish.mesh import open_mesh
from burnish.model.adapters.lora import LoRA
from burnish.model.config import ModelConfig
from burnish.model.load import load_model
from burnish.model.policy_model import PolicyModel
from burnish.model.wire import outgoing
from burnish.rollout.conformance import conform
from burnish.rollout.engine import EngineSetup, LiveEngine
from burnish.rollout.engines.vllm import VLLM
from burnish.rollout.weights import digest_of
from burnish.rollouts import SamplingParams
from tests.engine_helpers import asked, finish, largest_error, policy_logprobs

GENERATOR = torch.Generator().manual_seed(3)
PROMPTS = [[1, 20, 11, 60, 9, 31, 44] * 10, [5, 9, 2, 17], [7] * 33]


class Published:
    """The policy as it is now; see `Weights`."""

    def __init__(self, policy: PolicyModel, version: int) -> None:
        self.version, self.adapter_only = version, policy.adapter is not None
        self.named = [(n, t.detach().clone()) for n, t in outgoing(policy, adapter_only=self.adapter_only)]
        self.digest = digest_of(self.named)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.named

    def folder(self) -> Path:
        raise AssertionError("nobody wrote one")


@torch.no_grad()
def move(policy: PolicyModel, share: float) -> None:
    """What training might do to the weights."""
    for _, parameter in policy.trainable_parameters():
        noise = torch.randn(parameter.shape, generator=GENERATOR)
        parameter.add_(share * parameter.std().nan_to_num(0.0).clamp_min(0.02) * noise)
    policy.head.weight[policy.vocab_size :] = 0


def drifts(live: LiveEngine, policy: PolicyModel) -> dict[str, float]:
    """Largest differences of a log-probability after each of three syncs, and under requests in flight."""
    found = {}
    for version in range(100, 103):
        move(policy, 0.1)
        live.update_weights(Published(policy, version))
        for temperature in (1.0, 0.7):
            requests = [asked(prompt, version, 16, temperature=temperature) for prompt in PROMPTS]
            policy.temperature = temperature
            found[f"{version} {temperature}"] = largest_error(policy, requests, finish(live, requests))
    policy.temperature = 1.0
    requests = [asked(prompt, 0, 24) for prompt in PROMPTS]
    live.submit(requests)
    for _ in range(8):
        assert not live.step()
    move(policy, 0.1)
    live.update_weights(Published(policy, 103))
    completions = finish(live)
    after, before = 0.0, 0.0
    for request in requests:
        each = completions[request.request_id]
        assert each.versions == sorted(each.versions) and set(each.versions) == {102, 103}
        expected = policy_logprobs(policy, request.prompt_ids, each.token_ids)
        off = [abs(a - b) for a, b in zip(each.logprobs, expected, strict=True)]
        before, after = max(before, *off[: each.versions.index(103)]), max(after, *off[each.versions.index(103) :])
    return found | {"in flight": after, "moved": before}


def refusals(live: LiveEngine, policy: PolicyModel) -> dict[str, str]:
    """What is said of weights that are no good, each with a digest of its own."""
    said = {}
    for fault in ("missing", "unknown", "misshapen", "twice", "swapped"):
        weights: Any = Published(policy, 200)
        (first, one), (second, other) = weights.named[2:4]
        if fault == "missing":
            del weights.named[3]
        elif fault == "unknown":
            weights.named.append(("model.zork.weight", torch.zeros(2)))
        elif fault == "misshapen":
            weights.named[3] = (second, other[:-1])
        elif fault == "twice":
            weights.named.append((first, one))
        if fault != "twice":
            weights.digest = digest_of(weights.named)
        if fault == "swapped":
            weights.named[2:4] = [(first, one.flip(0)), (second, other)]
        try:
            live.update_weights(weights)
            said[fault] = f"taken as version {live.version}"
        except SyncFailed as error:
            said[fault] = f"{live.version} {error}"
    return said


def elsewhere(live: LiveEngine, policy: PolicyModel) -> str:
    """What is said of an adapter of layers whose names end as vLLM's do."""
    weights = Published(policy, 99)
    weights.named = [(f"language_model.{name}", tensor) for name, tensor in weights.named]
    weights.digest = digest_of(weights.named)
    try:
        live.update_weights(weights)
    except SyncFailed as error:
        return f"{live.version} {error}"
    return "taken"


def refused(do: Callable[[], Any]) -> str:
    try:
        do()
    except UserError as error:
        return str(error)
    return "not refused"


def main(path: str, kind: str) -> dict[str, Any]:
    """Findings, drifts and refusals."""
    config = ModelConfig(path=path, adapter=LoRA(r=4) if kind == "adapter" else None)
    engine = VLLM(kv_cache_gib=0.0625, max_num_seqs=4)
    setup = EngineSetup(config, 0, None, 128, (2,), path, 1.0)
    with open_mesh("cpu") as mesh:
        policy = load_model(config, mesh, seed=0)
    findings = conform(
        engine,
        setup,
        lambda version: Published(policy, version),
        prompts=PROMPTS,
        reference=lambda prompt, token_ids, heat: policy_logprobs(policy, prompt, token_ids, heat),
    )
    answer: dict[str, Any] = {"findings": [f"{finding.check}: {finding.reason}" for finding in findings]}
    answer["argument"] = refused(lambda: VLLM(engine_args={"block_sise": 16}).open(setup))
    answer["start"] = refused(lambda: VLLM(kv_cache_gib=1e-4, max_num_seqs=4).open(setup))
    live: Any = engine.open(setup)
    answer["elsewhere"] = elsewhere(live, policy) if kind == "adapter" else ""
    answer["token"] = refused(lambda: live.submit([asked([3, 320], 0)]))
    answer["drifts"] = drifts(live, policy)
    answer["refusals"] = refusals(live, policy)
    live.update_weights(Published(policy, 300))
    sampling = SamplingParams(max_new_tokens=60, stop=["a", "e", " "])
    request = asked(PROMPTS[1], 1, 60).__class__("stop", PROMPTS[1], 1, sampling)
    (answer["stopped"],) = [[each.token_ids, each.finish_reason] for each in finish(live, [request]).values()]
    live.close()
    answer["left"] = live._folder.exists()
    return answer


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
