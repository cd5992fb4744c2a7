"""Rewards and an environment that do what users' do on bad days; imported by reward processes."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from burnish.environments.base import Environment, Observation
from burnish.errors import ModelError
from burnish.rewards.base import LiveReward, Reward


def length(completions: list[str], **columns: Any) -> list[float]:
    """Of each completion, in characters."""
    return [float(len(each)) for each in completions]


async def length_later(completions: list[str]) -> list[int]:
    """The same, from a coroutine, as integers."""
    import asyncio

    await asyncio.sleep(0)
    return [len(each) for each in completions]


def answered(prompts: list[str], completions: list[str], answer: list[str], bonus: float) -> list[float]:
    """`bonus` where a completion is its prompt's answer."""
    return [bonus * (each == right) for each, right in zip(completions, answer, strict=True)]


def never(completions: list[str], **columns: Any) -> list[float]:
    """Always raises."""
    raise KeyError("the verifier was not deployed")


def one_for_all(completions: list[str], **columns: Any) -> list[float]:
    """A list of one number, however many completions there are."""
    return [1.0]


def number(completions: list[str]) -> Any:
    """A number, and no list of them."""
    return 1.0


def hang(completions: list[str], **columns: Any) -> list[float]:
    """Never answers."""
    time.sleep(1000)
    return []


def marked(completions: list[str], folder: str, **columns: Any) -> list[float]:
    """Leaves its process id in `folder` and takes its time at the first call there, and none later."""
    first = not os.listdir(folder)
    Path(folder, str(os.getpid())).touch()
    time.sleep(1000 if first else 0)
    return length(completions)


def spinning_with_child(completions: list[str], folder: str, **columns: Any) -> list[float]:
    """Forks a sleeper, then never lets go of Python's lock."""
    child = os.fork()
    if child == 0:
        time.sleep(1000)
    Path(folder, str(child)).touch()
    Path(folder, str(os.getpid())).touch()
    re.match(r"(a+)+$", "a" * 60 + "b")
    return []


def allocates(completions: list[str], **columns: Any) -> list[float]:
    """As many MiB as a completion says."""
    return [float(len(bytearray(int(each) << 20))) for each in completions]


def prints(completions: list[str], **columns: Any) -> list[float]:
    """To everywhere, as Python, as C and as a child of its own."""
    print("hello\nfrom python")
    print("no line end", end="")
    os.write(1, b"from the descriptor\n")
    subprocess.run(["echo", "from a child"], check=True)
    return length(completions)


def forks(completions: list[str], folder: str, **columns: Any) -> list[float]:
    """Comes back twice, and leaves a third process that holds all that it could get."""
    for lives in (False, True):
        if (child := os.fork()) == 0:
            if lives:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(1000)
            return [99.0 for _ in completions]
        Path(folder, str(child)).touch()
    return length(completions)


def leaves_the_session(completions: list[str], folder: str, **columns: Any) -> list[float]:
    """Starts a shell in a session of its own, and that a sleeper; then hangs."""
    command = f"sleep 1000 & touch {folder}/$$ {folder}/$!; wait"
    subprocess.Popen(["sh", "-c", command], start_new_session=True)
    time.sleep(1000)
    return []


def tells_its_environment(completions: list[str], **columns: Any) -> list[float]:
    """Whether it knows the variable of a completion's name."""
    return [float(each in os.environ) for each in completions]


def _never_mind() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)


def _hang_in_c() -> None:
    _never_mind()
    ctypes.PyDLL(None).sleep(1000)  # PyDLL: without giving up Python's lock


FAULTS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "nan": lambda: float("nan"),
    "infinite": lambda: -float("inf"),
    "huge": lambda: 10**400,
    "text": lambda: "1.0",
    "complex": lambda: 1j,
    "raises": lambda: {}["no such key"],
    "exits": lambda: exit(3),
    "dies": lambda: os._exit(3),
    "crashes": lambda: ctypes.string_at(0),
    "spins": lambda: re.match(r"(a+)+$", "a" * 60 + "b"),
    "hangs_in_c": _hang_in_c,
}


def faulty(completions: list[str], fault: str) -> list[Any]:
    """Length of each completion, and a fault for `bad`."""
    return [FAULTS[fault]() if each == "bad" else len(each) for each in completions]


def too_few(completions: list[str]) -> list[float]:
    """Leaves out `bad`."""
    return [float(len(each)) for each in completions if each != "bad"]


class Unready(Reward):
    """Cannot be opened."""

    how: Literal["refuses", "raises", "dies"]

    def open(self) -> LiveReward:
        if self.how == "refuses":
            raise ModelError("no weights", where="judge/7b", cure="download them")
        if self.how == "raises":
            raise OSError("port 8000 is taken")
        os._exit(7)


class Calculator(Environment):
    """Adds numbers; some words make it fail."""

    max_turns: int = 4
    seconds: float = 1.0
    folder: str = ""

    def reset(self, row: dict[str, Any], seed: int) -> Any:
        return {"sum": row["start"] + seed, "calls": 0}

    def step(self, state: Any, action: str) -> Any:
        if action == "hang":
            time.sleep(1000)
        if action == "die once" and not os.listdir(self.folder):
            Path(self.folder, "dead").touch()
            os._exit(1)
        if action == "tuple":
            return ([], state)
        if action == "nan":
            return Observation([], state, rewards={"solved": float("nan")})
        if action == "not json":
            return Observation([], {"open": {1, 2}})
        total = state["sum"] + int(action if action != "die once" else 0)
        return Observation(
            [{"role": "tool", "content": str(total)}],
            {"sum": total, "calls": state["calls"] + 1},
            done=total > 9,
            rewards={"step": 0.5},
        )


class Echo(Environment):
    """Answers as `role`, and never ends."""

    max_turns: int = 3
    role: str = "user"

    def step(self, state: Any, action: str) -> Observation:
        return Observation([{"role": self.role, "content": "go on"}], state)
