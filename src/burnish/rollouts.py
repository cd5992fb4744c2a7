"""What travels in on-policy training: prompts, requests to an engine, completions, rollouts and their groups.

A rollout is tokens in, tokens out: what an engine sampled is kept as it was sampled, and history is never tokenised
again. Every sampled token carries its log-probability under the engine and the version of the weights that drew it.
Plain Python lists: these objects cross processes, and the longest part of their life is spent waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from annotated_types import Ge, Interval

from burnish.component import Config

if TYPE_CHECKING:
    from burnish.errors import DataError
    from burnish.types import Row


class SamplingParams(Config):
    """How tokens are drawn. Log-probabilities are those of the distribution that was drawn from."""

    temperature: Annotated[float, Ge(0)] = 1.0
    """0: the likeliest token; evaluation only."""
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Draw from the fewest tokens that hold this much probability."""
    top_k: Annotated[int, Ge(0)] = 0
    """Draw from so many likeliest tokens; 0: from all."""
    max_new_tokens: Annotated[int, Ge(1)] = 256
    """Sampled tokens of one turn, at most."""
    stop: list[str] = []
    """Texts that end a turn; what was sampled up to and with them is kept and trained."""
    stop_token_ids: list[Annotated[int, Ge(0)]] = []
    """Tokens that end a turn beside the model's own."""

    @property
    def policy_temperature(self) -> float:
        """At which the policy computes the probability of what is drawn so: 1 where nothing is left to chance."""
        return self.temperature or 1.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row that is asked about, at its place in the run.

    >>> Prompt(17, "train.jsonl:4", [1, 20, 11, 20, 9], [{"role": "user", "content": "2+2?"}], {"answer": "4"})
    """

    index: int
    """Place in the run's order of prompts, from 0: what is consumed, re-issued and resumed by."""
    where: str
    """For people: the row's place."""
    token_ids: list[int]
    asked: Any
    """What rewards are given as the prompt: messages, a string, or a list of item names."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The row's other columns, JSON: what rewards and environments are given beside it."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that is not asked about, because the recipe says so; counted by its reason.

    >>> Dropped(18, "train.jsonl:5", "prompt longer than 512 tokens")
    """

    index: int
    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class Request:
    """One turn to be sampled. Equal requests to engines of equal weights give equal completions."""

    request_id: str
    """`17.3.0`: prompt 17, its fourth rollout, first turn."""
    prompt_ids: list[int]
    """All tokens before it. Requests of one group have equal ones, which an engine computes once."""
    seed: int
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine sampled for a request.

    >>> Completion("17.3.0", [22, 4], [-0.51, -0.02], [7, 8], "stop")    # the weights changed between the two tokens
    """

    request_id: str
    token_ids: list[int]
    """With the token that stopped it. May be empty where there was no room for one."""
    logprobs: list[float]
    """log p of each, after temperature, top-k and top-p: of the distribution it was drawn from."""
    versions: list[int]
    """Of the policy's weights that drew each."""
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One finished episode: prompt, sampled turns and what the environment said between them.

    User "2+2?", sampled "<calc>", observed "4", sampled "4.", as the training step sees them:

        token_ids   [ 1, 20, 11, 20, 9,   31, 2,   40, 22,   22, 4]
        loss_mask   [ 0,  0,  0,  0, 0,    1, 1,    0,  0,    1, 1]      True: sampled by the policy
        logprobs    [ 0,  0,  0,  0, 0, -.5, -.1,   0,  0, -.2, -.1]     the engine's, 0 elsewhere
        versions    [-1, -1, -1, -1, -1,  7, 7,    -1, -1,    7, 8]      -1: not sampled
    """

    token_ids: list[int]
    loss_mask: list[bool]
    logprobs: list[float]
    versions: list[int]
    num_prompt: int
    """Tokens of the prompt, the same for all rollouts of a group."""
    said: Any
    """What rewards were given as the completion, in the prompt's form."""
    terms: dict[str, float]
    """Each reward by its name, unweighted, and what the environment gave."""
    reward: float
    """Their weighted sum: what advantages are made of."""
    finish_reason: Literal["stop", "length"]
    """`length`: its last turn was cut off."""
    num_turns: int = 1
    failed: tuple[str, ...] = ()
    """Names of rewards that hung, raised or were no number, and stand at their `failed_value`; and `environment`, where
    a call of it failed and the episode ended there."""

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy drew."""
        return sum(self.loss_mask)

    @property
    def oldest_version(self) -> int:
        """Of the weights that drew any of its tokens; -1 where none was drawn."""
        return min((version for version in self.versions if version >= 0), default=-1)


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """All rollouts of one prompt: what is committed, taken and trained as one."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    version: int
    """Policy version that was published when its first request was made; no token is older."""

    @property
    def sample_ids(self) -> tuple[str, ...]:
        """Of its row, for events."""
        return (self.prompt.where,)

    @property
    def rewards(self) -> list[float]:
        """One a rollout."""
        return [rollout.reward for rollout in self.rollouts]

    def to_json(self) -> dict[str, Any]:
        """Plain data, for checkpoints and other processes. It shares the group's lists: `asdict` copies them number by
        number, 31 ms for 8 rollouts of 1,000 tokens, and this is asked every step."""
        return {
            "prompt": _by_field(self.prompt),
            "rollouts": [_by_field(rollout) for rollout in self.rollouts],
            "version": self.version,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RolloutGroup:
        """The group that `to_json` gave."""
        rollouts = tuple(Rollout(**{**each, "failed": tuple(each["failed"])}) for each in data["rollouts"])
        return cls(Prompt(**data["prompt"]), rollouts, data["version"])


def _by_field(part: Prompt | Rollout) -> dict[str, Any]:
    return {each.name: getattr(part, each.name) for each in fields(part)}


class Dialogue(Protocol):
    """How rows become prompts, and sampled tokens what rewards and environments read. Text or items."""

    stop_token_ids: tuple[int, ...]
    """Tokens that end a turn. None, as for items: a turn that is `max_new_tokens` long is whole, and not cut off."""

    def prompts(self, rows: Sequence[Row], first_index: int) -> list[Prompt | Dropped | DataError]:
        """One for each row, in order, numbered from `first_index`; a row that cannot be asked is the reason why."""
        ...

    def text(self, token_ids: Sequence[int]) -> str:
        """What was sampled, as text without special tokens; for items their names, separated by spaces."""
        ...

    def said(self, prompt: Prompt, turns: Sequence[Any]) -> Any:
        """A completion in the form of the prompt's `asked`: a string, messages, or item names.

        Args:
            turns: alternately the token ids of a sampled turn, and the list of messages that the environment answered.
        """
        ...

    def observe(self, prompt: Prompt, turns: Sequence[Any], messages: list[dict[str, Any]]) -> list[int]:
        """Tokens that stand between the sampled turn at the end of `turns` and the next one: the rest of its template,
        `messages`, and the opening of the model's turn. What was sampled is not tokenised again.

        Raises:
            DataError: the template cannot continue a conversation so.
        """
        ...
