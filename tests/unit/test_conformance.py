"""The checks that a team runs against its engine pass ours, and each of them can fail."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import pytest
import torch

from burnish.errors import SyncFailed
from burnish.model.policy_model import PolicyModel
from burnish.rollout.conformance import Finding, conform
from burnish.rollout.engine import EngineSetup, LiveEngine, Receipt, Weights
from burnish.rollout.engines.embedded import Embedded
from burnish.rollout.engines.fake import Fake, FakeEngine, LongTail
from burnish.rollouts import Completion, Request
from tests.engine_helpers import HandWeights, asked, finish, policy_logprobs, prompts, setup
from tests.tiny_models import tiny_model

SCRIPT = [[5, 6, 7], [8, 9], [1, 2, 3, 4]]


class Defective(Fake):
    """A fake engine with one defect."""

    type: Literal["tests.unit.test_conformance:Defective"] = "tests.unit.test_conformance:Defective"
    tokens: list[list[int]] = SCRIPT
    max_concurrent: int = 4
    defect: str = ""

    def open(self, setup: EngineSetup, model: PolicyModel | None = None) -> LiveEngine:
        return DefectiveEngine(self, setup)


class DefectiveEngine(FakeEngine):
    def __init__(self, script: Defective, setup: EngineSetup) -> None:
        super().__init__(script, setup)
        self.defect, self.cached, self.first = script.defect, [], 0
        if self.defect == "before_weights":
            self.version = 0

    def submit(self, requests: Sequence[Request]) -> None:
        if self.defect == "seeds":
            requests = [replace(request, seed=0) for request in requests]
        if self.defect == "company":
            requests = [replace(request, seed=request.seed + self._facts["sampled_tokens"] % 2) for request in requests]
        if self.defect == "stop_tokens":
            strip = {"stop_token_ids": []}
            requests = [replace(each, params=each.params.model_copy(update=strip)) for each in requests]
        if self.defect == "max_length":
            requests = [replace(request, prompt_ids=request.prompt_ids[:2]) for request in requests]
        super().submit(requests)
        if self.defect == "order":
            self._queue.reverse()

    def step(self) -> list[Completion]:
        if self.defect == "idle" and not self.num_unfinished:
            time.sleep(0.3)
        done = super().step()
        if self.defect == "completions":
            done = [replace(each, versions=each.versions[1:]) for each in done]
        if self.defect == "logprobs":
            done = [replace(each, logprobs=[0.1] * len(each.logprobs)) for each in done]
        if self.defect == "raises" and done:
            raise ZeroDivisionError("oh")
        if self.defect == "versions":
            done = [replace(each, versions=[self.version] * len(each.versions)) for each in done]
        return done

    def update_weights(self, weights: Weights) -> Receipt:
        if self.defect == "bad_weights":
            self.version = weights.version
            try:
                return super().update_weights(weights)
            except SyncFailed:
                self.version = weights.version
                return Receipt(weights.version, weights.digest, 0, 0.0)
        receipt = super().update_weights(weights)
        return replace(receipt, digest="") if self.defect == "receipt" else receipt

    def abort(self) -> None:
        if self.defect != "abort":
            super().abort()

    def wake(self) -> None:
        if self.defect == "sleep":
            raise RuntimeError("it sleeps on")

    def facts(self) -> dict[str, float]:
        facts = super().facts()
        return facts | {"prompt_tokens": 0.0} if self.defect == "facts" else facts


def findings(engine: Fake, **options: object) -> list[Finding]:
    return conform(engine, setup(16), HandWeights, prompts=prompts(4, 3), **options)  # pyright: ignore[reportArgumentType]


def test_the_embedded_engine_conforms() -> None:
    model = PolicyModel.from_hf(tiny_model("llama"))
    found = conform(
        Embedded(max_concurrent=4),
        setup(32),
        HandWeights,
        prompts=prompts(4, 3),
        model=model,
        reference=lambda prompt, token_ids, temperature: policy_logprobs(model, prompt, token_ids, temperature),
        tolerance=1e-5,
    )
    assert found == []


def test_the_fake_engine_conforms() -> None:
    assert findings(Fake(tokens=SCRIPT, max_concurrent=4)) == []
    assert findings(Defective()) == []


@pytest.mark.parametrize(
    ("defect", "check"),
    [
        *((name, name) for name in ("before_weights", "receipt", "idle", "completions", "max_length", "logprobs")),
        *(
            (name, name)
            for name in ("seeds", "stop_tokens", "versions", "bad_weights", "abort", "order", "sleep", "facts")
        ),
        ("company", "seeds"),
        ("raises", "completions"),
    ],
)
def test_a_defect_is_found_by_its_check(defect: str, check: str) -> None:
    assert check in {finding.check for finding in findings(Defective(defect=defect), seconds=2.0)}


def test_an_engine_of_other_log_probabilities_is_found() -> None:
    found = findings(Fake(tokens=SCRIPT), reference=lambda _prompt, token_ids, heat: [-1.2 * heat] * len(token_ids))
    assert found == [
        Finding("reference", "a log-probability is 0.2 from the reference's, more than 0.0001"),
        Finding("temperature", "at temperature 0.5 a log-probability is 0.4 from the reference's, more than 0.0001"),
    ]


def test_the_fake_engine_says_its_script_for_as_long_as_it_was_told() -> None:
    live = Fake(tokens=SCRIPT, logprob=-0.5, seconds_per_token=0.02).open(setup(stop_token_ids=(6,)))
    live.update_weights(HandWeights(3))
    started = time.monotonic()
    found = finish(live, [asked([1], seed, 3) for seed in range(3)])
    assert 0.05 < time.monotonic() - started < 2
    assert found["1.0.3"] == Completion("1.0.3", [5, 6], [-0.5] * 2, [3] * 2, "stop")
    assert found["1.1.3"] == Completion("1.1.3", [8, 9], [-0.5] * 2, [3] * 2, "stop")
    assert found["1.2.3"] == Completion("1.2.3", [1, 2, 3], [-0.5] * 3, [3] * 3, "length")
    assert live.facts() | {"busy_seconds": 0} == {
        "prompt_tokens": 3,
        "prompt_tokens_shared": 0,
        "sampled_tokens": 7,
        "busy_seconds": 0,
        "weight_tensors": 2,
    }


def test_lengths_have_a_long_tail_and_belong_to_the_seed() -> None:
    tail = LongTail(median=50, sigma=1.0)
    lengths = torch.tensor([tail.draw(seed) for seed in range(4000)]).float()
    assert lengths.median().item() == pytest.approx(50, rel=0.06)
    assert lengths.log().std().item() == pytest.approx(1.0, rel=0.05)
    live = Fake(tokens=[[7, 8]], length=LongTail(median=5, sigma=0)).open(setup())
    live.update_weights(HandWeights(0))
    assert finish(live, [asked([1], 9)])["1.9.8"].token_ids == [7, 8, 7, 8, 7]


def test_the_fake_engine_refuses_weights_that_are_not_what_was_sent() -> None:
    live, weights = Fake().open(setup()), HandWeights(0)
    weights.digest = "0" * 32
    with pytest.raises(SyncFailed, match="not 00000"):
        live.update_weights(weights)
    assert live.version == -1
