"""`workers: {type: inline}`: the engine is in the training process; sampling and training take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from burnish.errors import SyncFailed
from burnish.rollout.fleet import Fleet, Workers, idle

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from burnish.rollout.engine import Receipt, Weights
    from burnish.rollout.fleet import Parts
    from burnish.rollout.sync.base import WeightSync
    from burnish.rollouts import Completion, Request


class Inline(Workers):
    """One engine, in the training process. It may sample from the policy's own weights, so nothing has to travel."""

    type: Literal["inline"] = "inline"

    def open(self, parts: Parts) -> Fleet:
        return InlineFleet(parts)

    @property
    def beside(self) -> bool:
        return False


class InlineFleet:
    """One engine, stepped by whoever polls; see `Fleet`."""

    def __init__(self, parts: Parts) -> None:
        self._live, self.capacity = parts.engine.open(parts.setup, parts.model), parts.engine.capacity
        self._channel = _Channel(parts.sync, parts.run_dir)

    @property
    def num_workers(self) -> int:
        return 1

    def submit(self, requests: Sequence[Request], *, first: bool = False) -> None:
        """See `Fleet`. Sampling and training take turns, so what is not trained never waits for what is."""
        self._live.submit(requests)

    def poll(self, seconds: float) -> list[Completion]:
        """See `Fleet`. A step that has begun is finished, however long it takes."""
        until = time.monotonic() + seconds
        while self._live.num_unfinished:
            done = self._live.step()
            if done or time.monotonic() >= until:
                return done
        time.sleep(max(until - time.monotonic(), 0.0))
        return []

    def abort(self) -> None:
        """See `Fleet`."""
        self._live.abort()

    def publish(
        self,
        version: int,
        tensors: Callable[[], Iterator[tuple[str, Tensor]]],
        folder: Path | None,
        *,
        adapter_only: bool = False,
        alive: Callable[[], None] = idle,
    ) -> list[Receipt]:
        """See `Fleet`."""
        weights = AtHand(self._channel, version, tensors, folder, adapter_only=adapter_only)
        receipt = self._live.update_weights(weights)
        if (receipt.version, receipt.digest) != (version, weights.digest):
            raise SyncFailed(
                f"the engine holds version {receipt.version} with digest {receipt.digest}, and what was published is "
                f"version {version} with digest {weights.digest}"
            )
        self._channel.forget(version)
        return [replace(receipt, worker="inline")]

    def sleep(self, alive: Callable[[], None] = idle) -> None:
        """See `Fleet`."""
        self._live.sleep()

    def wake(self, alive: Callable[[], None] = idle) -> None:
        """See `Fleet`."""
        self._live.wake()

    def facts(self) -> dict[str, float]:
        """See `Fleet`."""
        return {"restarts": 0.0, "resubmitted": 0.0, "workers": 1.0, **self._live.facts()}

    def close(self) -> None:
        """See `Fleet`."""
        self._live.close()
        self._channel.close()


class AtHand:
    """Weights of the policy in this process; see `Weights`. They travel only if the engine asks for them."""

    def __init__(
        self,
        channel: _Channel,
        version: int,
        tensors: Callable[[], Iterator[tuple[str, Tensor]]],
        folder: Path | None,
        *,
        adapter_only: bool,
    ) -> None:
        self.version, self.adapter_only = version, adapter_only
        self._channel, self._tensors, self._folder = channel, tensors, folder
        self._received: Weights | None = None

    @property
    def digest(self) -> str:
        """Empty as long as nobody has asked for what it is of: the engine samples from the policy's own model."""
        return "" if self._received is None else self._received.digest

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Weights`."""
        return self._travelled().tensors()

    def folder(self) -> Path:
        """See `Weights`."""
        return self._travelled().folder()

    def _travelled(self) -> Weights:
        if self._received is None:
            self._received = self._channel.bring(
                self.version, self._tensors(), adapter_only=self.adapter_only, folder=self._folder
            )
        return self._received


class _Channel:
    """Both ends of a transport, opened when something is to travel."""

    def __init__(self, sync: WeightSync, run_dir: Path) -> None:
        self._sync, self._run_dir = sync, run_dir
        self._ends: tuple[Any, Any] | None = None

    def bring(self, version: int, tensors: Iterator[tuple[str, Tensor]], **how: Any) -> Weights:
        if self._ends is None:
            self._ends = self._sync.sender(self._run_dir), self._sync.receiver()
        sender, receiver = self._ends
        return receiver.receive(sender.send(version, tensors, **how))

    def forget(self, version: int) -> None:
        if self._ends is not None:
            self._ends[0].forget(version)

    def close(self) -> None:
        for end in reversed(self._ends or ()):
            end.close()
