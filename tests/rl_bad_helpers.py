"""Rewards and engines that do what users' do on bad days, for whole runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from burnish.rollout.engine import Engine, EngineSetup, LiveEngine
from burnish.rollout.engines.fake import Fake, FakeEngine
from burnish.rollouts import Completion


def _hang() -> Any:
    time.sleep(1000)


def _raise() -> Any:
    raise KeyError("no verdict")


FAULTS: dict[str, Callable[[], Any]] = {
    "hang": _hang,
    "raise": _raise,
    "none": lambda: None,
    "nan": lambda: float("nan"),
    "short": lambda: ...,
}


def faulty(completion_ids: list[list[int]], fault: str, folder: str) -> list[Any]:
    """1 for each completion; a fault for the first one that it was ever asked about, each time that it is."""
    victim = Path(folder, fault)
    if not victim.exists():
        victim.write_text(repr(completion_ids[0]))
    said = [FAULTS[fault]() if repr(ids) == victim.read_text() else 1.0 for ids in completion_ids]
    return [value for value in said if value is not ...]


def talkative(completions: list[Any]) -> list[float]:
    """Prints, and is right."""
    print("what a\nday")
    return [0.0 for _ in completions]


def one(completions: list[Any]) -> list[float]:
    """The same for all."""
    return [1.0 for _ in completions]


def mean_id(completion_ids: list[list[int]]) -> list[float]:
    """In thousands: of any two scripts it is another."""
    return [sum(ids) / (1000 * len(ids)) for ids in completion_ids]


class Unopened(Engine):
    """Cannot be opened."""

    type: str = "tests.rl_bad_helpers:Unopened"

    def open(self, setup: EngineSetup, model: Any = None) -> LiveEngine:
        raise OSError("no card in this machine")


class Breaking(Fake):
    """Ends at a step under the weights of a version."""

    type: str = "tests.rl_bad_helpers:Breaking"
    at_version: int = 0

    def open(self, setup: EngineSetup, model: Any = None) -> LiveEngine:
        return BreakingLive(self, setup)


class BreakingLive(FakeEngine):
    def step(self) -> list[Completion]:
        assert isinstance(self._script, Breaking)
        if self.num_unfinished and self.version >= self._script.at_version:
            raise OSError("the card fell off the bus")
        return super().step()


class Mute(Fake):
    """Has nothing to say to every other prompt of the first four, and to the next four at all."""

    type: str = "tests.rl_bad_helpers:Mute"

    def open(self, setup: EngineSetup, model: Any = None) -> LiveEngine:
        return MuteLive(self, setup)


class MuteLive(FakeEngine):
    def step(self) -> list[Completion]:
        return [_muted(each) for each in super().step()]


def _muted(said: Completion) -> Completion:
    prompt = said.request_id.partition(".")[0]
    if prompt in ("0", "2", "4", "5", "6", "7"):
        return replace(said, token_ids=[], logprobs=[], versions=[], finish_reason="length")
    return said
