"""The reward process: computes rewards and environments where they can be killed.

Started by `process.py` as an interpreter of its own. Requests come as pickles over a socket that nothing else knows of,
answers go back as JSON: what user code prints, forks or leaves behind never gets into them. Its group ends with its
parent, however that ends; what user code started in a session of its own does so only where the parent had time to end
it. Must import nothing heavy: rewards bring what they need.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import fcntl
import io
import json
import math
import os
import pickle
import resource
import select
import signal
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from burnish.environments.base import Observation
from burnish.errors import UserError

if TYPE_CHECKING:
    from burnish.environments.base import Environment
    from burnish.rewards.base import LiveReward, Reward

HEADER = 8
PREFIX = b"[reward] "
_LONGEST_REASON = 2000
_LARGEST = 3.4e38
"""Of float32, in which rewards are logged and advantages travel."""


class _Prefixed(io.RawIOBase):
    """Standard error, each line with where it comes from."""

    def __init__(self) -> None:
        self._held = b""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2

    def write(self, data: Any, /) -> int:
        data = bytes(data)
        *lines, self._held = (self._held + data).split(b"\n")
        self._print(lines)
        return len(data)

    def end_line(self) -> None:
        """Prints what has no line end yet."""
        if self._held:
            held, self._held = self._held, b""
            self._print([held])

    def _print(self, lines: list[bytes]) -> None:
        text = b"".join(PREFIX + line + b"\n" for line in lines)
        with contextlib.suppress(OSError):  # a closed terminal: nobody reads it, and no reward fails for it
            while text:
                text = text[os.write(2, text) :]


class _Parts:
    """Rewards and environment, ready."""

    def __init__(self, rewards: Sequence[Reward], environment: Environment) -> None:
        self._environment = environment
        self._rewards: list[tuple[Reward, LiveReward]] = []
        for index, reward in enumerate(rewards):
            try:
                self._rewards.append((reward, reward.open()))
            except UserError as error:
                error.reason = f"{error.where}: {error.reason}" if error.where else error.reason
                error.where = f"workflow.rewards.{index}"
                raise

    def answer(self, kind: str, *arguments: Any) -> dict[str, Any]:
        """What `score`, `reset` or `step` says, as JSON knows it."""
        if kind == "score":
            return self._score(*arguments)
        if kind == "reset":
            return {"state": self._environment.reset(*arguments)}
        return _plain(self._environment.step(*arguments))

    def _score(self, index: int, asked: Any, columns: dict[str, Any], each: dict[str, list[Any]]) -> dict[str, Any]:
        """Values of one reward; None where it is no number.

        Args:
            columns: of the row, one value each.
            each: by rollout: `completions`, `completion_ids`, `finish_reason`.
        """
        reward, live = self._rewards[index]
        size = len(each["completions"])
        # A copy for each, or a reward that appends to one prompt would change them all.
        row = {name: [copy.deepcopy(value) for _ in range(size)] for name, value in columns.items()}
        with _memory(reward.memory_mib):
            said = live(**{**row, **each, "prompts": [copy.deepcopy(asked) for _ in range(size)]})
            if isinstance(said, str | bytes | Mapping) or not hasattr(said, "__iter__"):
                raise TypeError(f"it said a {type(said).__name__}, not a list of numbers")
            values = list(said)
        if len(values) != size:
            raise ValueError(f"it said {len(values)} numbers for {size} completions")
        numbers = [number_of(value) for value in values]
        bad = next((repr(value)[:100] for value, number in zip(values, numbers, strict=True) if number is None), None)
        return {"values": numbers, "bad": bad}


def number_of(value: Any) -> float | None:
    """A finite number, of Python, numpy or torch; None for anything else."""
    if not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        return None
    try:
        number = float(value)
    except Exception:  # torch raises RuntimeError for a tensor of two, int OverflowError: none of them is a number
        return None
    return number if math.isfinite(number) and abs(number) <= _LARGEST else None


def _plain(said: Any) -> dict[str, Any]:
    if not isinstance(said, Observation):
        raise TypeError(f"step() returned a {type(said).__name__}, not an Observation")
    if not isinstance(said.messages, list) or not all(isinstance(message, dict) for message in said.messages):
        raise TypeError("the messages of an Observation are a list of dictionaries")
    rewards = {str(name): number_of(value) for name, value in said.rewards.items()}
    if None in rewards.values():
        raise ValueError(f"step() gave a reward that is no number: {said.rewards!r}"[:200])
    return {"messages": said.messages, "state": said.state, "done": bool(said.done), "rewards": rewards}


@contextlib.contextmanager
def _memory(mib: int | None) -> Iterator[None]:
    """Limits what may be allocated inside to so much more than now."""
    if mib is None or sys.platform != "linux":
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (held + (mib << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _reason(error: BaseException) -> str:
    """The end of its traceback, from the first line that is not ours."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames)).strip()[-_LONGEST_REASON:]


def _opened(setup: Any) -> tuple[_Parts | None, dict[str, Any]]:
    """(the parts, what the parent is told of them)."""
    path, pickled = setup
    sys.path[:] = path
    try:
        rewards, environment = pickle.loads(pickled)
        return _Parts(rewards, environment), {"ready": True}
    except UserError as error:
        return None, {"refused": [type(error).__name__, error.reason, error.where, error.cure]}
    except BaseException as error:  # user code at import or open: whatever it was, the parent ends the run with it
        return None, {"broken": _reason(error)}


def serve(channel: socket.socket, prints: _Prefixed) -> None:
    """Answers requests until the parent is gone."""
    me = os.getpid()
    parts, answer = _opened(_read(channel))
    while True:
        prints.end_line()
        if os.getpid() != me:  # user code forked, and the child came back here: only one of them may answer
            os._exit(0)
        _write(channel, answer)
        if parts is None or (request := _read(channel)) is None:
            return
        try:
            answer = parts.answer(*request)
            json.dumps(answer, allow_nan=False)
        except BaseException as error:  # of user code, SystemExit too: the rollout fails, not the process
            answer = {"raised": _reason(error)}


def _read(channel: socket.socket) -> Any:
    size = int.from_bytes(_exactly(channel, HEADER), "little")
    return pickle.loads(_exactly(channel, size)) if size else None


def _exactly(channel: socket.socket, size: int) -> bytes:
    """So many bytes; fewer where the parent is gone."""
    received = bytearray()
    while len(received) < size:
        if not (piece := channel.recv(min(size - len(received), 1 << 20))):
            return b""
        received += piece
    return bytes(received)


def _write(channel: socket.socket, answer: dict[str, Any]) -> None:
    payload = json.dumps(answer, allow_nan=False).encode()
    with contextlib.suppress(ConnectionError):  # the parent is gone: the next read says so
        channel.sendall(len(payload).to_bytes(HEADER, "little") + payload)


def _end_with_parent(lifeline: int) -> None:
    """Has the kernel kill this process group once nobody holds the other end of the pipe `lifeline`.

    The parent-death signal of prctl will not do: it comes when the *thread* that started us ends.
    """
    if sys.platform == "linux":
        f_setsig = 10
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, f_setsig, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    watch = select.poll()
    watch.register(lifeline, select.POLLIN)
    if watch.poll(0):  # it was gone before
        os._exit(1)


def _begin(channel: socket.socket, lifeline: int) -> _Prefixed:
    """Makes the process safe for user code; returns where prints go."""
    _end_with_parent(lifeline)
    for fd in (channel.fileno(), lifeline):
        os.set_inheritable(fd, False)
    numbers = (signal.SIGINT, signal.SIGTERM)

    def forget() -> None:
        channel.close()
        os.close(lifeline)
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)

    os.register_at_fork(after_in_child=forget)
    for number in numbers:  # sent to every process of a job: the run decides when this one ends
        signal.signal(number, lambda *_: None)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()
    prints = _Prefixed()
    raw: Any = prints
    sys.stdout = sys.stderr = io.TextIOWrapper(raw, "utf-8", "backslashreplace", write_through=True)
    return prints


def main() -> None:
    """Arguments: file descriptors of the socket and of the lifeline."""
    channel, lifeline = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    serve(channel, _begin(channel, lifeline))


if __name__ == "__main__":
    main()
