"""Says what it was told to say, and takes as long as it was told to take: for tests and for measuring what is around
an engine."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt, Le, MinLen

from burnish.component import Config
from burnish.errors import SyncFailed
from burnish.rollout.engine import Engine, EngineSetup, LiveEngine, Receipt
from burnish.rollouts import Completion, Request

if TYPE_CHECKING:
    from burnish.model.policy_model import PolicyModel
    from burnish.rollout.engine import Weights


class LongTail(Config):
    """Log-normal lengths, as completions have: most are short, and a few hold everybody up."""

    median: Annotated[float, Gt(0)] = 64.0
    """Tokens."""
    sigma: Annotated[float, Ge(0)] = 1.0
    """Of the logarithm: at 1 one in 44 is longer than seven medians."""

    def draw(self, seed: int) -> int:
        """A length for a request, at least 1."""
        return max(round(self.median * math.exp(self.sigma * Random(seed).gauss(0.0, 1.0))), 1)


class Fake(Engine):
    """Scripted completions. It has no model: log-probabilities are what they are set to, and weights are read, checked
    and counted."""

    type: Literal["fake"] = "fake"
    tokens: Annotated[list[Annotated[list[Annotated[int, Ge(0)]], MinLen(1)]], MinLen(1)] = [[0]]
    """Completions, by token ids; a request is given the one at its seed modulo their number."""
    length: LongTail | None = None
    """Present: a completion is said over and over up to a length drawn from the request's seed."""
    logprob: Annotated[float, Le(0)] = -1.0
    """Of every token."""
    seconds_per_token: Annotated[float, Ge(0)] = 0.0
    """A step, which is a token for all that are in flight, takes so long."""
    max_concurrent: Annotated[int, Ge(1)] = 64
    """Requests in flight at once; the others wait."""

    @property
    def capacity(self) -> int:
        return self.max_concurrent

    def open(self, setup: EngineSetup, model: PolicyModel | None = None) -> LiveEngine:
        """See `Engine`. The policy's own model is not looked at."""
        return FakeEngine(self, setup)


@dataclass(slots=True)
class _Turn:
    request: Request
    script: list[int]
    stop_token_ids: frozenset[int]
    most: int
    """Tokens that there is room for."""
    versions: list[int] = field(default_factory=list)


class FakeEngine:
    """See `LiveEngine`."""

    def __init__(self, script: Fake, setup: EngineSetup) -> None:
        self.version = -1
        self._script, self._setup = script, setup
        self._queue: deque[_Turn] = deque()
        self._in_flight: list[_Turn] = []
        self._facts = {
            "prompt_tokens": 0.0,
            "prompt_tokens_shared": 0.0,
            "sampled_tokens": 0.0,
            "busy_seconds": 0.0,
            "weight_tensors": 0.0,
        }

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues them."""
        for request in requests:
            said = self._script.tokens[request.seed % len(self._script.tokens)]
            if self._script.length is not None:
                length = self._script.length.draw(request.seed)
                said = (said * -(-length // len(said)))[:length]
            most = min(request.params.max_new_tokens, max(self._setup.max_length - len(request.prompt_ids), 0))
            stops = frozenset((*self._setup.stop_token_ids, *request.params.stop_token_ids))
            self._queue.append(_Turn(request, said, stops, most))

    @property
    def num_unfinished(self) -> int:
        """Requests queued or in flight."""
        return len(self._queue) + len(self._in_flight)

    def step(self) -> list[Completion]:
        """A token for all that are in flight."""
        if not self.num_unfinished:
            return []
        if self.version < 0:
            raise SyncFailed("asked to sample, and the engine holds no version of the policy")
        while self._queue and len(self._in_flight) < self._script.max_concurrent:
            turn = self._queue.popleft()
            self._facts["prompt_tokens"] += len(turn.request.prompt_ids)
            self._in_flight.append(turn)
        time.sleep(self._script.seconds_per_token)
        self._facts["busy_seconds"] += self._script.seconds_per_token
        finished = []
        for turn in self._in_flight:
            if turn.most:
                turn.versions.append(self.version)
                self._facts["sampled_tokens"] += 1
            reason = self._over(turn)
            if reason is not None:
                said = turn.script[: len(turn.versions)]
                logprobs = [self._script.logprob] * len(said)
                finished.append(Completion(turn.request.request_id, said, logprobs, turn.versions, reason))
        over = {completion.request_id for completion in finished}
        self._in_flight = [turn for turn in self._in_flight if turn.request.request_id not in over]
        return finished

    def _over(self, turn: _Turn) -> Literal["stop", "length"] | None:
        count = len(turn.versions)
        if count == len(turn.script) or (count and turn.script[count - 1] in turn.stop_token_ids):
            return "stop"
        return "length" if count == turn.most else None

    def abort(self) -> None:
        """Forgets all requests."""
        self._queue.clear()
        self._in_flight = []

    def update_weights(self, weights: Weights) -> Receipt:
        """Reads all of a version and says what came."""
        from burnish.rollout.weights import Listing

        started, self.version, came = time.perf_counter(), -1, Listing()
        for name, tensor in weights.tensors():
            came.add(name, tensor)
        if came.digest != weights.digest:
            raise SyncFailed(f"version {weights.version} came with digest {came.digest}, not {weights.digest}")
        self.version = weights.version
        self._facts["weight_tensors"] += len(came.entries)
        return Receipt(weights.version, came.digest, came.num_bytes, time.perf_counter() - started)

    def sleep(self) -> None:
        """It holds nothing that it could give away."""
        assert not self.num_unfinished, "asked to sleep with requests in flight"

    def wake(self) -> None:
        """See `sleep`."""

    def facts(self) -> dict[str, float]:
        """See `LiveEngine`; also `weight_tensors`, how many came in all."""
        return dict(self._facts)

    def close(self) -> None:
        """Forgets all requests."""
        self.abort()
