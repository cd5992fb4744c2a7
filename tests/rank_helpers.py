"""Several ranks in one process: a thread each, and a mesh of theirs that exchanges JSON as the real one does."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from burnish.policy.checkpoint import Piece
from burnish.region import Region
from tests.checkpoint_helpers import Folder, MemoryDisk, PowerCut

T = TypeVar("T")

SECONDS = 20.0
"""Longest that a rank waits for the others here."""


class ThreadMesh:
    """What a checkpoint needs of a mesh. A rank that dies breaks the exchange for all, as a closed connection does."""

    def __init__(self, rank: int, world_size: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world_size, self._slots, self._barrier = rank, world_size, slots, barrier

    def gather(self, item: T) -> list[T]:
        self._slots[self.rank] = json.dumps(item)
        self._barrier.wait(SECONDS)
        items = [json.loads(slot) for slot in self._slots]
        self._barrier.wait(SECONDS)
        return items


def on_ranks(world_size: int, work: Callable[[ThreadMesh], T]) -> list[T]:
    """What `work` returns on every rank; raises what the first rank raised that was not only left alone."""
    slots, barrier = [None] * world_size, threading.Barrier(world_size)
    results: list[Any] = [None] * world_size
    errors: list[BaseException | None] = [None] * world_size

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadMesh(rank, world_size, slots, barrier))
        except BaseException as error:
            errors[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * SECONDS)
        assert not thread.is_alive(), "a rank hangs"
    causes = [error for error in errors if error is not None and not isinstance(error, threading.BrokenBarrierError)]
    for error in [*causes, *filter(None, errors)]:
        raise error
    return results


class SharedDisk(MemoryDisk):
    """A disk under several ranks, whose operations come in the given order of ranks; None: as they come.

    `log` says who did what: (0, "create", "manifest.json"). The power goes before operation `cut_at` for all ranks; the
    rank `dies` alone before its own operation `dies_at`.
    """

    def __init__(
        self,
        root: Folder | None = None,
        *,
        order: list[int] | None = None,
        cut_at: int | None = None,
        dies: int | None = None,
        dies_at: int = 0,
    ) -> None:
        super().__init__(root)
        self.order, self.cut_at, self.log = order, cut_at, []
        self.dies, self.dies_at = dies, dies_at
        self._turn = threading.Condition()

    def of(self, rank: int) -> RankDisk:
        """What one rank sees of it."""
        return RankDisk(self, rank)

    @contextmanager
    def turn(self, rank: int, operation: str, name: str) -> Iterator[None]:
        """Holds all others back while the rank does one operation."""
        with self._turn:
            assert self._turn.wait_for(lambda: self._is_turn(rank), SECONDS), "the order does not fit the operations"
            own = sum(who == rank for who, _, _ in self.log)
            if self._is_cut() or (rank == self.dies and own >= self.dies_at):
                self._turn.notify_all()
                raise PowerCut
            self.log.append((rank, operation, name))
            try:
                yield
            finally:
                self._turn.notify_all()

    def _is_cut(self) -> bool:
        return self.cut_at is not None and len(self.log) >= self.cut_at

    def _is_turn(self, rank: int) -> bool:
        at = len(self.log)
        return self._is_cut() or self.order is None or at >= len(self.order) or self.order[at] == rank


class RankDisk(MemoryDisk):
    def __init__(self, shared: SharedDisk, rank: int) -> None:
        super().__init__(shared.root)
        self._shared, self._rank, self._open = shared, rank, shared._open


def _taking_turns(operation: str) -> Callable:
    def method(self: RankDisk, *arguments: Any) -> Any:
        name = arguments[0].name if isinstance(arguments[0], Path) else ""
        with self._shared.turn(self._rank, operation, name):
            return getattr(MemoryDisk, operation)(self, *arguments)

    return method


for _name in (
    "make_directory",
    "create",
    "append",
    "sync",
    "sync_directory",
    "rename",
    "remove_file",
    "remove_directory",
):
    setattr(RankDisk, _name, _taking_turns(_name))


def box(shape: tuple[int, ...], rank: int, fsdp: int, tp: int) -> Region:
    """What a rank of an fsdp x tp layout holds: tp cuts dim 1 evenly where it can, fsdp then dim 0 as torch.chunk."""
    offsets, lengths = [0] * len(shape), list(shape)
    if len(shape) > 1 and shape[1] % tp == 0:
        lengths[1] //= tp
        offsets[1] = rank % tp * lengths[1]
    if shape:
        step = -(-shape[0] // fsdp)
        offsets[0] = min(rank // tp * step, shape[0])
        lengths[0] = min(step, shape[0] - offsets[0])
    return Region(shape, tuple(offsets), tuple(lengths))


def pieces(tensors: dict[str, dict[str, torch.Tensor]], rank: int, fsdp: int, tp: int) -> dict[str, dict[str, Piece]]:
    """What a rank of an fsdp x tp layout gives to a checkpoint: of ranks with the same box, the first writes it."""

    def piece(tensor: torch.Tensor) -> Piece:
        region = box(tuple(tensor.shape), rank, fsdp, tp)
        mine = all(box(tuple(tensor.shape), other, fsdp, tp) != region for other in range(rank))
        return Piece(tensor[region.slices()], region, mine)

    return {group: {name: piece(tensor) for name, tensor in members.items()} for group, members in tensors.items()}
