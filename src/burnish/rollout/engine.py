"""What generates rollouts: the contract of an engine, and what weights look like on their way to one.

An engine is driven from one thread: requests go in with `submit`, `step` advances all that are in flight a little and
returns those that finished. Between two steps its weights may change: what is in flight goes on under the new ones, and
each token says which version drew it. `rollout/conformance.py` proves an engine against this contract; a team's own
inference engine is `engine: {type: my_module:MyEngine}`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from burnish.component import Component
from burnish.model.config import ModelConfig

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from burnish.errors import UserError
    from burnish.model.policy_model import PolicyModel
    from burnish.rollouts import Completion, Request
    from burnish.types import NewTokens


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """What an engine is made for; pickled to the process that it lives in."""

    model: ModelConfig
    """The policy's, as it was before the first step."""
    seed: int
    """Of weights that no file holds."""
    new_tokens: NewTokens | None
    max_length: int
    """Longest prompt and completion together, in tokens."""
    stop_token_ids: tuple[int, ...]
    """That end every turn."""
    tokenizer_path: str
    """A folder with the tokenizer, for engines that stop at texts."""
    temperature: float
    """At which the policy computes its log-probabilities: that of every request whose tokens are trained."""


class Weights(Protocol):
    """A version of the policy on its way to an engine. The transport has brought it, or will as it is read."""

    version: int

    @property
    def digest(self) -> str:
        """Of names, dtypes, shapes and bytes, by the sender. Empty where nothing travels: the engine samples from the
        policy's own model, and does not ask for the tensors."""
        ...

    adapter_only: bool
    """Only the trained adapter's tensors, under the names that the policy's model has for them; else the whole model
    under Hugging Face names, an adapter merged."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All of them, on the CPU. Raises SyncFailed: they are not what was sent."""
        ...

    def folder(self) -> Path:
        """A Hugging Face folder with them (for an adapter a PEFT folder), for engines that read files. Same errors."""
        ...


@dataclass(frozen=True, slots=True)
class Receipt:
    """What an engine says it holds after a sync."""

    version: int
    digest: str
    """Computed anew from what arrived, on the receiving side."""
    num_bytes: int
    seconds: float
    worker: str = ""


class LiveEngine(Protocol):
    """An engine with its model in memory."""

    version: int
    """Of the weights it holds; -1: those of the model's files, which nobody may sample from."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues them; they are begun in order, as there is room. `request_id`s are new."""
        ...

    def step(self) -> list[Completion]:
        """Advances what is in flight by at least a token, and returns what finished by it. Returns at once if idle.

        Raises:
            RunFailed: it cannot go on: out of memory with a single request in flight.
        """
        ...

    @property
    def num_unfinished(self) -> int:
        """Requests queued or in flight."""
        ...

    def abort(self) -> None:
        """Forgets all requests."""
        ...

    def update_weights(self, weights: Weights) -> Receipt:
        """Takes a version; from the next `step` on every token is drawn by it, and prefixes that were computed before
        are not used for new requests.

        Raises:
            SyncFailed: it is incomplete, or does not belong to this model. The engine then holds no valid version.
        """
        ...

    def sleep(self) -> None:
        """Gives its memory to the trainer, where both share a device; nothing is in flight."""
        ...

    def wake(self) -> None:
        """Takes it back."""
        ...

    def facts(self) -> dict[str, float]:
        """Counters since it was opened: `prompt_tokens`, `prompt_tokens_shared`, `sampled_tokens`, `busy_seconds`."""
        ...

    def close(self) -> None: ...


class Engine(Component):
    """Samples completions, chosen by `rollout.engine: {type: ...}`."""

    def open(self, setup: EngineSetup, model: PolicyModel | None = None) -> LiveEngine:
        """Loads it.

        Args:
            model: the policy's own model, which an engine in the training process may sample from as it is; its weights
                are then those of the policy at any moment, and `update_weights` only takes note of the version.

        Raises:
            UserError: a package is missing, or it cannot run this model.
        """
        raise AssertionError(f"{type(self).__name__} cannot be opened")

    def refuse(self, setup: EngineSetup) -> Iterable[str]:
        """Reasons why it cannot serve such a run, known before anything is loaded."""
        return ()

    def lacking(self) -> UserError | None:
        """Which package it needs and this environment does not have, known without an import of it."""
        return None

    @property
    def is_policy_code(self) -> bool:
        """Whether it runs the policy's own modules, so that only rounding may differ."""
        return False

    @property
    def needs_own_process(self) -> bool:
        """Whether it cannot be opened in the training process."""
        return False

    def computes_in(self, dtype: str) -> str:
        """The dtype of its weights, where the policy's is `dtype`."""
        return dtype

    def takes_adapter(self, setup: EngineSetup) -> bool:
        """Whether it is content with an adapter's own tensors, where they are all that trains. False: it is given the
        whole model, merged."""
        return True

    def device_bytes(self, weights: int, keys: int, device: int, *, shares_model: bool) -> int:
        """What one of it takes on its device at most, before anything is loaded.

        Args:
            weights: bytes of the model in `computes_in`.
            keys: bytes of the keys and values of `capacity` rollouts of full length.
            device: bytes that the device has; 0: it computes on a CPU.
            shares_model: it samples from the policy's own model, where it can.
        """
        return keys + (0 if shares_model and self.is_policy_code else weights)

    @property
    def capacity(self) -> int:
        """Requests that one of it runs at once. Of several workers each is given about so many, and more as it
        finishes."""
        return 64
