"""Asynchronous saving: the step waits for a copy in memory, a background thread does the rest.

Owns the staging buffers and the one save in flight. Must not know the format.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from burnish.errors import RunFailed
from burnish.policy.checkpoint import reader
from burnish.policy.checkpoint.manifest import step_of, tensor_bytes
from burnish.policy.checkpoint.reader import LoadedCheckpoint
from burnish.policy.checkpoint.storage import Storage
from burnish.policy.checkpoint.writer import clean, prune, write_checkpoint

Staged = dict[str, dict[str, Tensor]]

T = TypeVar("T")

DEADLINE_SECONDS = 1800.0
"""Longest wait for a disk: a network file system that hangs must not hang the run for ever."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint is complete and durable."""

    kind: ClassVar[str] = "checkpoint_saved"
    step: int
    path: Path
    num_bytes: int
    seconds: float
    """In the background, from the end of the copy to the end of the commit."""
    note: str = ""
    """What went wrong afterwards: an old checkpoint that could not be deleted."""

    def facts(self) -> dict[str, Any]:
        """For the event log."""
        return {"step": self.step, "bytes": self.num_bytes, "seconds": self.seconds, "note": self.note}


@dataclass(frozen=True, slots=True)
class SaveFailed:
    """The disk refused; the run goes on, and the checkpoints before are as they were."""

    kind: ClassVar[str] = "checkpoint_failed"
    step: int
    reason: str

    def facts(self) -> dict[str, Any]:
        """For the event log."""
        return {"step": self.step, "reason": self.reason}


class Checkpointer:
    """Saves and loads the checkpoints of one run folder, which the caller owns.

    >>> checkpointer = Checkpointer(run_dir, keep=2)
    >>> checkpointer.save(10, {"model": {"lm_head.weight": weight}}, {"data": {"cursor": 80}})
    >>> checkpointer.poll()         # at a later step
    [Saved(step=10, ...)]
    """

    def __init__(self, run_dir: Path, *, keep: int, storage: Storage | None = None) -> None:
        assert keep >= 1, "a run without a checkpoint cannot be resumed"
        self.run_dir = run_dir
        self._keep = keep
        self._storage = storage or Storage()
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._overlapped = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._staged: Future[Staged] | None = None
        self._saving: Future[Saved | SaveFailed] | None = None
        self._finished: list[Saved | SaveFailed] = []
        self._corrupt: set[int] = set()

    def overlap(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on even the copy runs in the background, beside the next forward pass: `save` returns at once, and
        `optimizer.step`, which alone may change saved tensors, waits until the copy is made."""
        self._overlapped = True
        optimizer.register_step_pre_hook(lambda *_: self.wait_staged())

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any], *, wait: bool = False
    ) -> None:
        """Copies the tensors and returns; they may change at once. A save still in flight is waited for first.

        Args:
            step: finished steps.
            tensors: group (a file) -> Hugging Face name -> tensor of any device, layout, shape and dtype.
            state: JSON: what is no tensor.
            wait: return when the checkpoint is durable, or has failed: `poll` says which.
        """
        self.wait()
        encoded = json.dumps(state).encode()
        ready = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if ready is not None:
            ready.record()
        self._staged = self._thread.submit(self._stage, tensors, ready)
        self._saving = self._thread.submit(self._write, step, self._staged, encoded)
        if not self._overlapped:
            self.wait_staged()
        if wait:
            self.wait()

    def wait_staged(self) -> None:
        """Returns when the tensors of the last save may change."""
        if self._staged is not None:
            self._result(self._staged)
            self._staged = None

    def poll(self) -> list[Saved | SaveFailed]:
        """Saves that finished since the last poll; never waits. A bug in the background is raised here."""
        if self._saving is not None and self._saving.done():
            self.wait()
        finished, self._finished = self._finished, []
        return finished

    def wait(self) -> None:
        """Returns when no save is in flight."""
        if self._saving is not None:
            self._finished.append(self._result(self._saving))
            self._saving = None

    def close(self) -> None:
        """Waits for the save in flight and ends the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown(wait=False)

    def _result(self, future: Future[T]) -> T:
        try:
            return future.result(DEADLINE_SECONDS)
        except TimeoutError as error:
            raise RunFailed(
                f"the checkpoint in {self.run_dir} has not reached the disk for {DEADLINE_SECONDS:.0f} s; "
                f"the checkpoints before it are as they were"
            ) from error

    def load_latest(self) -> LoadedCheckpoint | None:
        """The newest intact checkpoint, or None; nothing on the disk changes. See `reader.load_latest`."""
        loaded = reader.load_latest(self.run_dir, self._storage)
        if loaded is not None:
            steps = (step_of(name) for name in self._storage.names(self.run_dir))
            self._corrupt = {step for step in steps if step is not None and step > loaded.step}
        return loaded

    def _stage(self, tensors: Mapping[str, Mapping[str, Tensor]], ready: torch.cuda.Event | None) -> Staged:
        """Contiguous copies on the CPU, in buffers that are kept: a fresh buffer's page faults cost more than the copy
        (2.1 GB/s against 7.7 GB/s), and pinned memory is slow to get."""
        staged: Staged = {group: {} for group in tensors}
        with contextlib.ExitStack() as stack:
            if ready is not None:  # beside the training's kernels, and after those that made these tensors
                stream = torch.cuda.Stream(ready.device)
                stream.wait_event(ready)
                stack.callback(stream.synchronize)
                stack.enter_context(torch.cuda.stream(stream))
            for group, members in tensors.items():
                for name, tensor in members.items():
                    buffer = self._buffers.get((group, name))
                    if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                        buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                    _copy(buffer, tensor.detach())
                    staged[group][name] = buffer
        self._buffers = {(group, name): buffer for group in staged for name, buffer in staged[group].items()}
        return staged

    def _write(self, step: int, staged: Future[Staged], state: bytes) -> Saved | SaveFailed:
        tensors = staged.result()
        begin = time.monotonic()
        try:
            clean(self._storage, self.run_dir)
            path = write_checkpoint(self._storage, self.run_dir, step, tensors, state)
        except OSError as error:
            return SaveFailed(step, str(error))
        seconds = time.monotonic() - begin
        num_bytes = len(state) + sum(tensor.nbytes for members in tensors.values() for tensor in members.values())
        self._corrupt.discard(step)
        try:
            prune(self._storage, self.run_dir, step, self._keep, self._corrupt)
        except OSError as error:  # the next save tries again
            return Saved(step, path, num_bytes, seconds, note=f"an old checkpoint is still there: {error}")
        return Saved(step, path, num_bytes, seconds)


def _copy(buffer: Tensor, tensor: Tensor) -> None:
    if tensor.is_cpu and tensor.is_contiguous():
        # One thread, without the interpreter's lock. torch would cut every tensor in pieces for all cores and wait for
        # each: 17 ms for 256 MiB on two idle cores, 335 ms where another process keeps one busy; this: 31 ms.
        np.copyto(np.asarray(tensor_bytes(buffer)), tensor_bytes(tensor))
    else:
        buffer.copy_(tensor, non_blocking=True)
