"""What the ranks of a run do together about a checkpoint: what befalls one befalls all.

Must not know what a checkpoint is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from burnish.errors import ResumeError, RunFailed, Unreachable

T = TypeVar("T")


class Ranks(Protocol):
    """What is needed of a `Mesh`."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def gather(self, item: T) -> list[T]:
        """Every rank's `item` (JSON), in rank order, on every rank."""
        ...


class Alone:
    """One process that has no mesh."""

    rank, world_size = 0, 1

    def gather(self, item: T) -> list[T]:
        return [item]


def together(ranks: Ranks, work: Callable[[], T]) -> list[T]:
    """Every rank's result (JSON), in rank order, on every rank.

    Raises:
        Exception: what `work` raised here; where it raised on another rank only, ResumeError or RunFailed as it was
            there, RunFailed that names the rank for all else. No rank waits for one that has failed.
    """
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    answers: list[Any] = ranks.gather([result, None if failure is None else told(failure)])
    if failure is not None:
        raise failure
    raise_told([telling for _, telling in answers])
    return [answer for answer, _ in answers]


def told(error: BaseException) -> list[str]:
    """An exception as JSON, for the other ranks."""
    if isinstance(error, ResumeError):
        return ["ResumeError", error.reason, error.where, error.cure]
    return [type(error).__name__, str(error)]


def raise_told(tellings: list[list[str] | None]) -> None:
    """Raises what the first of the ranks that failed has told."""
    for rank, telling in enumerate(tellings):
        if telling is None:
            continue
        if telling[0] == "ResumeError":
            raise ResumeError(*telling[1:])
        if telling[0] in ("RunFailed", "Unreachable"):
            raise (RunFailed if telling[0] == "RunFailed" else Unreachable)(telling[1])
        raise RunFailed(f"rank {rank}: {': '.join(telling)}")
