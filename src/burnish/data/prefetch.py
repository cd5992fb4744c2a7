"""A background thread that makes things ahead of their use. It knows nothing about what it makes."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

from burnish.errors import RunFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

DEADLINE_SECONDS = 300.0


class Prefetch(Generic[T]):
    """The items of an iterator, in order, up to `size` of them made ahead.

    What the iterator raises is raised by `get` in its place in the order, and again by every `get` after it.
    """

    def __init__(self, items: Iterator[T], size: int, doing: Callable[[], str]) -> None:
        """`doing`: what the thread is busy with, for the error that names it when nothing comes."""
        self._items, self._size, self._doing = items, size, doing
        self._made: deque[T] = deque()
        self._error: BaseException | None = None
        self._over = self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="burnish-prefetch", daemon=True)
        self._thread.start()

    def get(self, deadline_seconds: float = DEADLINE_SECONDS) -> T | None:
        """The next item; None once the iterator is over.

        Raises:
            RunFailed: nothing was made within the deadline.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._made or self._over, deadline_seconds):
                raise RunFailed(f"no packed row for {deadline_seconds:.0f} s; the data thread is {self._doing()}")
            if self._made:
                item = self._made.popleft()
                self._changed.notify_all()
                return item
            if self._error is not None:
                raise self._error
            return None

    def close(self) -> None:
        """Ends the thread once what it is busy with is done; waits for that, at most the deadline."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(DEADLINE_SECONDS)

    def _run(self) -> None:
        error = None
        try:
            for item in self._items:
                with self._changed:
                    self._changed.wait_for(lambda: len(self._made) < self._size or self._closed)
                    if self._closed:
                        return
                    self._made.append(item)
                    self._changed.notify_all()
        except BaseException as raised:  # handed to the consumer, which raises it
            error = raised
        with self._changed:
            self._error, self._over = error, True
            self._changed.notify_all()
