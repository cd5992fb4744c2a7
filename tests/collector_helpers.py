"""A collector with a fleet and judges that do as they are told."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from burnish.environments.base import Observation
from burnish.errors import DataError
from burnish.rewards.pool import Draft, Score
from burnish.rollout.collector import Collector
from burnish.rollout.config import RolloutConfig
from burnish.rollouts import Completion, Prompt, Request, RolloutGroup, SamplingParams

STOP = 2


class ScriptedFleet:
    """Answers a request, when it is asked to, with `say(request)` and `STOP`, drawn by the version that is told."""

    def __init__(self, say: Callable[[Request], list[int]] = lambda request: [10]) -> None:
        self.say, self.version, self.holds = say, 0, False
        self.asked: list[Request] = []
        self.all: list[str] = []
        self.hurried: list[str] = []
        self.finished: list[Completion] = []

    def submit(self, requests: Sequence[Request], *, first: bool = False) -> None:
        self.asked += requests
        self.all += [request.request_id for request in requests]
        self.hurried += [request.request_id for request in requests if first]
        if not self.holds:
            self.answer(*[request.request_id for request in requests])

    def answer(self, *names: str) -> None:
        for name in names:
            (request,) = [each for each in self.asked if each.request_id == name]
            self.asked.remove(request)
            self.finished.append(self.said(request))

    def said(self, request: Request) -> Completion:
        whole = [*self.say(request), STOP]
        token_ids = whole[: request.params.max_new_tokens]
        logprobs = [-float(token) for token in token_ids]
        reason = "stop" if len(token_ids) == len(whole) else "length"
        return Completion(request.request_id, token_ids, logprobs, [self.version] * len(token_ids), reason)

    def poll(self, seconds: float) -> list[Completion]:
        finished, self.finished = self.finished, []
        return finished

    def abort(self) -> None:
        self.asked.clear()
        self.finished.clear()

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a collector was not expected to ask for {name}")


class ScriptedJudges:
    """A rollout is worth the sum of its sampled tokens but `STOP`; the environment is `react(state, action)`."""

    def __init__(self, react: Callable[[Any, str], Any] = lambda state, action: Observation([], None, done=True)):
        self.react, self.finished, self.holds = react, list[tuple[str, Any]](), False
        self.signs_of_life = 0
        self.misheard: list[tuple[str, str]] = []
        self.scored: list[str] = []
        self.drafts: dict[str, Sequence[Draft]] = {}

    def score(self, key: str, prompt: Prompt, drafts: Sequence[Draft]) -> None:
        self.scored.append(key)
        self.drafts[key] = drafts
        said = []
        for draft in drafts:
            own = float(sum(token for token in draft.token_ids if token != STOP))
            said.append(Score({"sum": own, **draft.terms}, own + sum(draft.terms.values()), draft.failed))
        self.finished.append((key, said))

    def reset(self, key: str, row: dict[str, Any], seed: int) -> None:
        self.finished.append((key, self.react({"start": row["start"], "seed": seed}, "reset")))

    def step(self, key: str, state: Any, action: str) -> None:
        self.finished.append((key, self.react(state, action)))

    def poll(self, seconds: float) -> list[tuple[str, Any]]:
        if self.holds:
            time.sleep(seconds)
            return []
        finished, self.finished = self.finished, []
        return finished

    def abort(self) -> None:
        self.finished.clear()

    def misspoken(self, where: str, why: str) -> None:
        self.misheard.append((where, why))

    @property
    def num_unfinished(self) -> int:
        return len(self.finished)


class Words:
    """Tokens are said as their numbers; what an environment says is tokenised as the numbers in it."""

    stop_token_ids = (STOP,)

    def text(self, token_ids: Sequence[int]) -> str:
        return " ".join(str(token) for token in token_ids if token != STOP)

    def said(self, prompt: Prompt, turns: Sequence[Any]) -> str:
        return " | ".join(self.text(turn) for turn in turns[::2])

    def observe(self, prompt: Prompt, turns: Sequence[Any], messages: list[dict[str, Any]]) -> list[int]:
        for message in messages:
            if message["content"] is None:
                raise DataError("the tool turn has no content", prompt.where, "fill it in")
        return [int(word) for message in messages for word in message["content"].split()]

    def prompts(self, rows: Any, first_index: int) -> Any:
        raise AssertionError("prompts come from `prompt_at`")


def prompt_at(index: int) -> Prompt | str | None:
    return Prompt(index, f"rows.jsonl:{index}", [1, 100 + index], "?", {"start": index})


def collector(fleet: ScriptedFleet, judges: ScriptedJudges | None = None, **fields: Any) -> Collector:
    """Two prompts a step, two rollouts each; it begins with the weights of version 0."""
    places = {name: fields.pop(name) for name in ("prompt_at", "per_step", "max_length", "max_turns") if name in fields}
    interactive = fields.pop("interactive", False)
    settings = {"group_size": 2, "sampling": SamplingParams(max_new_tokens=4)} | fields
    made = Collector(
        config=RolloutConfig(**settings),
        fleet=fleet,
        judges=judges or ScriptedJudges(),
        dialogue=Words(),
        interactive=interactive,
        seed=5,
        **({"prompt_at": prompt_at, "per_step": 2, "max_length": 32} | places),
    )
    made.published(0)
    return made


def collected(made: Collector, most: int = 100) -> list[RolloutGroup]:
    """The next step's groups."""
    for _ in range(most):
        if (groups := made.take()) is not None:
            return groups
        made.pump(0.0)
    raise AssertionError(made.waits_for())


def sampled(made: Collector, names: list[str]) -> list[RolloutGroup]:
    """Groups that were begun beside those that are trained."""
    for _ in range(100):
        if (groups := made.finished(names)) is not None:
            return groups
        made.pump(0.0)
    raise AssertionError(made.waits_for())


def indices(groups: Sequence[RolloutGroup]) -> list[int]:
    return [group.prompt.index for group in groups]


def number(request: Request) -> list[int]:
    """The rollout's own: 10 for the first of its group, 11 for the second."""
    return [10 + int(request.request_id.split(".")[1])]
