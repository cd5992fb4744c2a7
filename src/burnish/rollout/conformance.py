"""Does an engine keep the contract of `rollout/engine.py`? For a team that plugs in its own.

    findings = conform(MyEngine(), setup, weights, prompts=[[5, 9, 2], [7, 7]], reference=policy_logprobs)
    assert not findings, findings

One engine is opened and put through all checks, in order:

    before_weights   it is at version -1, and samples nothing
    receipt          an update is answered by its version and digest, and the engine is at that version
    idle             a step without requests returns at once, with nothing
    completions      each request is answered once, with as many log-probabilities and versions as tokens, no more
                     tokens than it may have, and `length` only where it has them all
    max_length       prompt and completion are no longer than the setup allows; no room: an empty completion
    logprobs         every log-probability is a number, 0 at most
    reference        and the one that the caller computes for the same tokens
    temperature      also where the tokens are drawn at another temperature than 1
    seeds            the same request draws the same tokens in other company; other seeds draw others
    stop_tokens      a stop token ends the turn and is kept
    versions         weights that change under a request show in its tokens, and requests after it have the new ones
    bad_weights      weights that break off are refused by SyncFailed, and nothing is sampled until others come
    abort            forgotten requests are not heard of again, and their ids can be used anew
    order            requests beyond its capacity are not finished before those that came first
    sleep            it works again after it slept and was given weights
    facts            its counters say what happened

A check that the engine answers with an exception fails with it. It must not know any engine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from burnish.errors import BurnishError, SyncFailed
from burnish.rollouts import Completion, Request, SamplingParams

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from burnish.model.policy_model import PolicyModel
    from burnish.rollout.engine import Engine, EngineSetup, LiveEngine, Weights

Reference = Callable[[list[int], list[int], float], Sequence[float]]
"""`reference(prompt_ids, token_ids, temperature)`: a log-probability of each of `token_ids`."""

IDLE_SECONDS = 0.2
"""Longest that an idle step may take."""
COOL = 0.5
"""A temperature, at which an engine shows that says the model's own log-probabilities, not those that it drew by."""
_FACTS = ("prompt_tokens", "prompt_tokens_shared", "sampled_tokens", "busy_seconds")


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong."""

    check: str
    reason: str


def conform(
    engine: Engine,
    setup: EngineSetup,
    weights: Callable[[int], Weights],
    *,
    prompts: Sequence[Sequence[int]],
    model: PolicyModel | None = None,
    reference: Reference | None = None,
    tolerance: float = 1e-4,
    max_new_tokens: int = 8,
    seconds: float = 60.0,
) -> list[Finding]:
    """Puts an engine through all checks and says what fails; nothing, if it conforms.

    Args:
        weights: a version of the policy, by its number, 0 at first; what they hold may be the same each time.
        prompts: token ids of two at least, different ones, with room for `max_new_tokens` more.
        model: for an engine that samples from the policy in this process.
        reference: log-probabilities of a completion's tokens after a prompt, at a temperature; without it they are not
            compared.
        tolerance: largest difference to them.
        seconds: a check fails that lasts longer. A step that never returns cannot be ended from here.
    """
    assert len(prompts) >= 2, "two prompts at least"
    live = engine.open(setup, model)
    trial = _Trial(live, setup, weights, [list(prompt) for prompt in prompts], engine.capacity, max_new_tokens, seconds)
    trial.reference, trial.tolerance = reference, tolerance
    findings = []
    try:
        for check in _CHECKS:
            name = check.__name__.removeprefix("_")
            try:
                findings += [Finding(name, reason) for reason in check(trial)]
            except Exception as error:  # an engine under test may raise anything: that is what is to be found out
                findings.append(Finding(name, f"raised {type(error).__name__}: {error}"))
            live.abort()
    finally:
        live.close()
    return findings


@dataclass(slots=True)
class _Trial:
    live: LiveEngine
    setup: EngineSetup
    weights: Callable[[int], Weights]
    prompts: list[list[int]]
    capacity: int
    max_new_tokens: int
    seconds: float
    reference: Reference | None = None
    tolerance: float = 0.0
    version: int = -1
    done: list[tuple[Request, Completion]] = field(default_factory=list)
    """Of `completions`, for checks after it."""
    _ids: int = 0

    def request(self, prompt: list[int], seed: int, **params: object) -> Request:
        self._ids += 1
        sampling = SamplingParams.model_validate({"max_new_tokens": self.max_new_tokens, **params})
        return Request(f"{self._ids}.0.0", prompt, seed, sampling)

    def publish(self) -> None:
        self.version += 1
        self.live.update_weights(self.weights(self.version))

    def run(self, requests: Sequence[Request]) -> dict[str, Completion]:
        """Submits them and steps until all are finished."""
        self.live.submit(requests)
        return {completion.request_id: completion for batch in self.batches() for completion in batch}

    def batches(self) -> Iterator[list[Completion]]:
        """What each step finished, until nothing is left."""
        until = time.monotonic() + self.seconds
        while self.live.num_unfinished:
            if time.monotonic() > until:
                raise TimeoutError(f"{self.live.num_unfinished} requests are unfinished after {self.seconds:.0f} s")
            yield self.live.step()


def _before_weights(trial: _Trial) -> Iterator[str]:
    if trial.live.version != -1:
        yield f"it opens at version {trial.live.version}, not -1"
    yield from _samples_nothing(trial)


def _samples_nothing(trial: _Trial) -> Iterator[str]:
    trial.live.submit([trial.request(trial.prompts[0], 0)])
    sampled = trial.live.facts().get("sampled_tokens", 0.0)
    for _ in range(trial.max_new_tokens + 2):
        try:
            done = trial.live.step()
        except BurnishError:
            return
        if done or trial.live.facts().get("sampled_tokens", 0.0) > sampled:
            yield "it samples without a version of the policy"
            return


def _receipt(trial: _Trial) -> Iterator[str]:
    trial.version += 1
    weights = trial.weights(trial.version)
    receipt = trial.live.update_weights(weights)
    if (receipt.version, receipt.digest) != (weights.version, weights.digest):
        yield f"version {weights.version}, {weights.digest!r} is answered by {receipt.version}, {receipt.digest!r}"
    if trial.live.version != weights.version:
        yield f"after version {weights.version} it is at {trial.live.version}"


def _idle(trial: _Trial) -> Iterator[str]:
    started = time.monotonic()
    done = trial.live.step()
    lasted = time.monotonic() - started
    if done or trial.live.num_unfinished:
        yield f"without requests it has {trial.live.num_unfinished} unfinished, and finishes {done}"
    if lasted > IDLE_SECONDS:
        yield f"an idle step lasts {lasted:.2f} s"


def _completions(trial: _Trial) -> Iterator[str]:
    requests = [trial.request(prompt, seed) for prompt in trial.prompts for seed in range(8)]
    trial.live.submit(requests)
    if trial.live.num_unfinished != len(requests):
        yield f"{len(requests)} requests are {trial.live.num_unfinished} unfinished ones"
    finished = [completion for batch in trial.batches() for completion in batch]
    if sorted(each.request_id for each in finished) != sorted(request.request_id for request in requests):
        yield f"{len(requests)} requests are answered by {len(finished)} completions, not each by one"
        return
    by_id = {completion.request_id: completion for completion in finished}
    trial.done = [(request, by_id[request.request_id]) for request in requests]
    for request, each in trial.done:
        count, most = len(each.token_ids), request.params.max_new_tokens
        if not count == len(each.logprobs) == len(each.versions):
            yield f"{count} tokens, {len(each.logprobs)} log-probabilities, {len(each.versions)} versions"
        if not 0 < count <= most or (each.finish_reason == "length" and count < most):
            yield f"{count} tokens of at most {most} end by {each.finish_reason!r}"
        if set(each.versions) - {trial.version}:
            yield f"tokens of version {trial.version} are said to be of {sorted(set(each.versions))}"


def _max_length(trial: _Trial) -> Iterator[str]:
    prompt = (trial.prompts[0] * trial.setup.max_length)[: trial.setup.max_length]
    cut, full = trial.request(prompt[:-2], 0), trial.request(prompt, 0)
    found = trial.run([cut, full])
    if len(found[cut.request_id].token_ids) > 2:
        yield f"{len(found[cut.request_id].token_ids)} tokens where there is room for 2"
    if found[full.request_id].token_ids or found[full.request_id].finish_reason != "length":
        yield f"no room for a token, and the completion is {found[full.request_id]}"


def _logprobs(trial: _Trial) -> Iterator[str]:
    for _, each in trial.done:
        wrong = [value for value in each.logprobs if not (math.isfinite(value) and value <= 0)]
        if wrong:
            yield f"a log-probability of {wrong[0]}"


def _reference(trial: _Trial) -> Iterator[str]:
    yield from _compared(trial, trial.done)


def _temperature(trial: _Trial) -> Iterator[str]:
    requests = [trial.request(prompt, seed, temperature=COOL) for prompt in trial.prompts for seed in range(4)]
    found = trial.run(requests)
    said = _compared(trial, [(request, found[request.request_id]) for request in requests])
    yield from (f"at temperature {COOL:g} {reason}" for reason in said)


def _compared(trial: _Trial, done: Sequence[tuple[Request, Completion]]) -> Iterator[str]:
    if trial.reference is None:
        return
    worst = 0.0
    for request, each in done:
        expected = trial.reference(request.prompt_ids, each.token_ids, request.params.temperature)
        worst = max([worst, *(abs(a - b) for a, b in zip(each.logprobs, expected, strict=True))])
    if not worst <= trial.tolerance:
        yield f"a log-probability is {worst:.2g} from the reference's, more than {trial.tolerance:.2g}"


def _seeds(trial: _Trial) -> Iterator[str]:
    again = [trial.request(request.prompt_ids, request.seed) for request, _ in trial.done[::-2]]
    found = trial.run(again)
    for request, (_, before) in zip(again, trial.done[::-2], strict=True):
        if found[request.request_id].token_ids != before.token_ids:
            yield f"seed {request.seed} draws {found[request.request_id].token_ids}, and drew {before.token_ids}"
    first = [each.token_ids for request, each in trial.done if request.prompt_ids == trial.prompts[0]]
    if all(token_ids == first[0] for token_ids in first):
        yield f"{len(first)} seeds draw the same tokens"


def _stop_tokens(trial: _Trial) -> Iterator[str]:
    request, whole = max(trial.done, key=lambda pair: len(pair[1].token_ids))
    stop = whole.token_ids[len(whole.token_ids) // 2]
    expected = whole.token_ids[: whole.token_ids.index(stop) + 1]
    again = trial.request(request.prompt_ids, request.seed, stop_token_ids=[stop])
    found = trial.run([again])[again.request_id]
    if (found.token_ids, found.finish_reason) != (expected, "stop"):
        yield f"with stop token {stop}: {found.token_ids} by {found.finish_reason!r}, not {expected} by 'stop'"


def _versions(trial: _Trial) -> Iterator[str]:
    request, _ = max(trial.done, key=lambda pair: len(pair[1].token_ids))
    under = trial.request(request.prompt_ids, request.seed)
    trial.live.submit([under])
    sampled = trial.live.facts()["sampled_tokens"]
    while trial.live.num_unfinished and trial.live.facts()["sampled_tokens"] == sampled:
        if trial.live.step():
            return  # finished by the step that began it: nothing can change under such a request
    old = trial.version
    trial.publish()
    after = trial.request(trial.prompts[1], 0)
    found = trial.run([after])
    versions = found[under.request_id].versions
    if versions != sorted(versions) or set(versions) != {old, trial.version}:
        yield f"version {trial.version} came under a request of {old}, and its tokens are of {versions}"
    if set(found[after.request_id].versions) != {trial.version}:
        yield f"a request after version {trial.version} has tokens of {found[after.request_id].versions}"


class _BreaksOff:
    """Weights of which half arrives."""

    def __init__(self, weights: Weights) -> None:
        self.version, self.digest, self.adapter_only = weights.version, weights.digest, weights.adapter_only
        self._weights, self.is_read = weights, False

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        self.is_read = True
        named = list(self._weights.tensors())
        yield from named[: len(named) // 2]
        raise SyncFailed("the other half did not come")

    def folder(self) -> Path:
        self.is_read = True
        raise SyncFailed("half of it did not come")


def _bad_weights(trial: _Trial) -> Iterator[str]:
    trial.version += 1
    broken = _BreaksOff(trial.weights(trial.version))
    try:
        trial.live.update_weights(broken)
    except SyncFailed:
        yield from _samples_nothing(trial)
    else:
        if broken.is_read:
            yield "it takes weights that break off"
    trial.live.abort()
    trial.publish()


def _abort(trial: _Trial) -> Iterator[str]:
    request = trial.request(trial.prompts[0], 0)
    trial.live.submit([request, trial.request(trial.prompts[1], 1)])
    trial.live.step()
    trial.live.abort()
    if trial.live.num_unfinished:
        yield f"{trial.live.num_unfinished} requests are unfinished after they were forgotten"
    trial.live.submit([request])
    finished = [completion.request_id for batch in trial.batches() for completion in batch]
    if finished != [request.request_id]:
        yield f"asked {request.request_id} anew after it was forgotten, and {finished} came"


def _order(trial: _Trial) -> Iterator[str]:
    count = 2 * trial.capacity
    requests = [trial.request(trial.prompts[seed % 2], seed, max_new_tokens=2) for seed in range(count)]
    trial.live.submit(requests)
    batch_of = {each.request_id: i for i, batch in enumerate(trial.batches()) for each in batch}
    finished = [batch_of[request.request_id] for request in requests]
    early = [i for i in range(trial.capacity, count) if finished[i] < max(finished[: i - trial.capacity + 1])]
    if early:
        yield f"of {count} requests, with {trial.capacity} at once, number {early[0]} overtook earlier ones"


def _sleep(trial: _Trial) -> Iterator[str]:
    trial.live.sleep()
    trial.live.wake()
    trial.publish()
    request = trial.request(trial.prompts[0], 0)
    if not trial.run([request])[request.request_id].token_ids:
        yield "it samples nothing after it slept"


def _facts(trial: _Trial) -> Iterator[str]:
    before = trial.live.facts()
    missing = [name for name in _FACTS if name not in before]
    if missing:
        yield f"no counter {', '.join(missing)}"
        return
    request = trial.request(trial.prompts[0], 0)
    found = trial.run([request])[request.request_id]
    after = trial.live.facts()
    for name, count in (("prompt_tokens", len(request.prompt_ids)), ("sampled_tokens", len(found.token_ids))):
        if after[name] - before[name] != count:
            yield f"{name} went up by {after[name] - before[name]:g} for a request of {count}"


_CHECKS = (
    _before_weights,
    _receipt,
    _idle,
    _completions,
    _max_length,
    _logprobs,
    _reference,
    _temperature,
    _seeds,
    _stop_tokens,
    _versions,
    _bad_weights,
    _abort,
    _order,
    _sleep,
    _facts,
)
