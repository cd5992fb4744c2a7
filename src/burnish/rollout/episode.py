"""One rollout while it is being sampled: turns of the policy, and what was said to it between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal

from burnish.rollouts import Completion, Prompt, Request, SamplingParams


def seed_of(*parts: int | str) -> int:
    """A seed of 63 bits that is a function of its parts alone: a prompt that is sampled again draws the same."""
    digest = blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(slots=True)
class Episode:
    """Grows token by token as it came; nothing in it is tokenised again."""

    name: str
    """`17.3`: prompt 17, its fourth rollout."""
    prompt: Prompt
    params: SamplingParams
    max_length: int
    """Tokens of prompt and turns together, at most."""
    seed: int
    token_ids: list[int] = field(default_factory=list)
    """Behind the prompt."""
    loss_mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    turns: list[Any] = field(default_factory=list)
    """Alternately sampled token ids and the messages of the environment; see `Dialogue`."""
    state: Any = None
    """The environment's."""
    terms: dict[str, float] = field(default_factory=dict)
    finish_reason: Literal["stop", "length"] = "length"
    over: bool = False
    has_failed: bool = False
    """The environment did not answer."""

    @property
    def room(self) -> int:
        """Tokens that it may still grow by."""
        return self.max_length - len(self.prompt.token_ids) - len(self.token_ids)

    @property
    def sampled_ids(self) -> list[int]:
        """The policy's tokens of all turns."""
        return [token for token, is_sampled in zip(self.token_ids, self.loss_mask, strict=True) if is_sampled]

    @property
    def num_turns(self) -> int:
        """Of the policy."""
        return (len(self.turns) + 1) // 2

    @property
    def request_id(self) -> str:
        """Of its next turn."""
        return f"{self.name}.{self.num_turns}"

    def request(self) -> Request:
        """Its next turn."""
        most = min(self.params.max_new_tokens, self.room)
        return Request(
            request_id=self.request_id,
            prompt_ids=self.prompt.token_ids + self.token_ids,
            seed=seed_of(self.seed, self.num_turns),
            params=self.params.model_copy(update={"max_new_tokens": most}),
        )

    def sampled(self, completion: Completion) -> None:
        """The policy's turn."""
        count = len(completion.token_ids)
        assert count == len(completion.logprobs) == len(completion.versions), completion
        self.token_ids += completion.token_ids
        self.loss_mask += [True] * count
        self.logprobs += completion.logprobs
        self.versions += completion.versions
        self.turns.append(list(completion.token_ids))
        self.finish_reason = completion.finish_reason

    def observed(self, messages: Sequence[dict[str, Any]], token_ids: Sequence[int]) -> None:
        """What the environment said, which is read and never trained."""
        count = len(token_ids)
        self.token_ids += token_ids
        self.loss_mask += [False] * count
        self.logprobs += [0.0] * count
        self.versions += [-1] * count
        self.turns.append(list(messages))

    def rewarded(self, rewards: dict[str, float]) -> None:
        """What the environment gave for a step."""
        for name, value in rewards.items():
            self.terms[name] = self.terms.get(name, 0.0) + value

    @property
    def last_action(self) -> list[int]:
        """The tokens of the policy's last turn."""
        return self.turns[-1]
