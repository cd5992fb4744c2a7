"""Signs of life: where ranks of this machine leave them, and how long one has been silent.

A beat is a counter and a word in shared memory, so it is read however stuck the rank is. Silence is measured by the
reader's own clock, from when it saw the counter move: ranks need no clock that agrees. Must not know who acts on it.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable, Sequence

from burnish.launch.worker_group import Beat

_BYTES = 64
"""Of a rank: 8 of its counter, 56 of its phase."""


class BeatBoard:
    """One line a rank in memory that the processes of a machine share; `fd` is handed to them at their start.

    >>> board = BeatBoard.create(2)
    >>> BeatBoard(board.fd).writer(1)("step 12")
    >>> board.read(2)
    [Beat(count=0, phase=''), Beat(count=1, phase='step 12')]
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, os.fstat(fd).st_size)

    @classmethod
    def create(cls, size: int) -> BeatBoard:
        """A board for so many ranks. Raises OSError on a full disk."""
        with tempfile.TemporaryFile() as file:
            file.write(bytes(size * _BYTES))  # written, so that a disk that fills up later cannot take the pages away
            file.flush()
            return cls(os.dup(file.fileno()))

    def writer(self, rank: int) -> Callable[[str], None]:
        """What rank `rank` calls with the phase it begins."""
        line = memoryview(self._memory)[rank * _BYTES : (rank + 1) * _BYTES]
        counter, words = line[:8].cast("Q"), line[8:]

        def beat(phase: str) -> None:
            words[:] = phase.encode()[: len(words)].ljust(len(words), b"\0")
            counter[0] += 1

        return beat

    def read(self, size: int) -> list[Beat]:
        """The last beats of ranks 0 to `size` - 1. A phase that is being written may be read half."""
        lines = [self._memory[rank * _BYTES : (rank + 1) * _BYTES] for rank in range(size)]
        return [
            Beat(int.from_bytes(line[:8], "little"), line[8:].rstrip(b"\0").decode(errors="replace")) for line in lines
        ]

    def clear(self) -> None:
        """As before any beat; no rank runs."""
        self._memory[:] = bytes(len(self._memory))

    def close(self) -> None:
        self._memory.close()
        os.close(self.fd)


class Silence:
    """For how long each rank has not been heard of.

    Seconds count only while somebody looks: of the time between two looks at most a quarter of the limit, so that a
    watcher that was suspended, or starved for a minute, does not take all ranks for hung when it wakes up.

    Args:
        limit: seconds after which a rank is overdue.
        start_limit: the same until its first step.
    """

    def __init__(
        self, size: int, limit: float, start_limit: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits, self._clock = (limit, start_limit), clock
        self._counts, self.seconds = [0] * size, [0.0] * size
        self._looked = clock()

    @property
    def look_every(self) -> float:
        """Seconds between two looks: at most a fiftieth of the limit, by which a rank may be found too early."""
        return min(max(min(self._limits) / 50, 0.01), 0.5)

    def look(self, beats: Sequence[Beat]) -> list[int]:
        """Ranks that are overdue now.

        Counted from the look before the one that saw the last beat, so a rank is found by its limit and not after it.
        """
        now = self._clock()
        passed, self._looked = now - self._looked, now
        overdue = []
        for rank, beat in enumerate(beats):
            limit = self._limits[0] if beat.started else self._limits[1]
            credited = min(max(passed, 0.0), limit / 4)
            moved = beat.count != self._counts[rank]
            self._counts[rank] = beat.count
            self.seconds[rank] = credited if moved else self.seconds[rank] + credited
            if self.seconds[rank] + self.look_every >= limit:  # the next look would be too late
                overdue.append(rank)
        return overdue
