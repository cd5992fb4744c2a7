"""Which rank holds the others up, and by what.

Ranks wait for each other in every step, so all of them show the step time of the slowest. What differs is what a rank
does alone: how long it waits for its own rows, and how long its device takes for a fixed piece of work that all begin
together. A throttled or shared device shows there and nowhere else. Slow links between ranks show in neither.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

LOOK_EVERY = 20
"""Steps between two looks: one exchange of some hundred bytes, and a probe of 2 ms on a GPU, 20 ms on a CPU core."""
RATIO = 1.5
"""Of the median, above which a rank is slow..."""
LOOKS = 3
"""...in so many looks in a row: the other tenant who was there for a minute is gone by then."""
CAUSES = {
    "its rows": 0.05,
    "its device": 0.002,
}
"""What a rank is slow by, and the seconds above `RATIO` times the median that nobody would notice: of waiting a step,
and of the probe."""


class Finding(NamedTuple):
    """A rank that holds the others up."""

    rank: int
    cause: str
    """One of `CAUSES`."""
    seconds: float
    median: float
    """Seconds of the rank in the middle."""

    def __str__(self) -> str:
        what = "waits for {}" if self.cause == "its rows" else "is slow by {}"
        return f"rank {self.rank} {what.format(self.cause)}: {self.seconds:.3g} s, the median is {self.median:.3g} s"


class Stragglers:
    """Judges the looks of a run, all ranks at once."""

    def __init__(self) -> None:
        self._slow: Counter[tuple[int, str]] = Counter()

    def judge(self, seconds: Sequence[Sequence[float]]) -> list[Finding]:
        """Who was slow in this look and the two before it; told once, and again after a look in which it was not.

        Args:
            seconds: for each rank, in rank order, one number for each of `CAUSES`.

        Of an even number of ranks the median is the lower of the two in the middle: of two ranks it is the faster one.
        """
        found = []
        for column, (cause, floor) in enumerate(CAUSES.items()):
            values = [row[column] for row in seconds]
            median = statistics.median_low(values)
            for rank, value in enumerate(values):
                if value <= RATIO * median + floor:
                    self._slow[rank, cause] = 0
                    continue
                self._slow[rank, cause] += 1
                if self._slow[rank, cause] == LOOKS:
                    found.append(Finding(rank, cause, value, median))
        return found


class Gathers(Protocol):
    """What a look needs of a mesh."""

    @property
    def world_size(self) -> int: ...

    def gather(self, item: list[float]) -> list[list[float]]: ...


class Lookout:
    """Looks at the ranks of a run now and then; every rank holds one and calls it at the same steps.

    Args:
        probe: seconds that this rank's device takes for a fixed piece of work.
    """

    def __init__(self, mesh: Gathers, probe: Callable[[], float], every: int = LOOK_EVERY) -> None:
        self._mesh, self._probe, self._every = mesh, probe, every
        self._stragglers = Stragglers()
        self._waits: list[float] = []

    def after_step(self, data_wait_seconds: float) -> list[Finding]:
        """Notes what this rank waited for rows in a step; the findings of a look, the same on every rank."""
        if self._mesh.world_size == 1:
            return []
        self._waits.append(data_wait_seconds)
        if len(self._waits) < self._every:
            return []
        wait, self._waits = sum(self._waits) / len(self._waits), []
        self._mesh.gather([])  # the probes begin together, so none runs beside another rank's work of the step
        return self._stragglers.judge(self._mesh.gather([wait, self._probe()]))


def device_probe(device: torch.device) -> Callable[[], float]:
    """Seconds of square products on a device, the best of three: 1.1 TFLOP in bfloat16 on a GPU, of 24 MB, and 0.3
    GFLOP in float32 on a CPU."""
    import torch

    on_gpu = device.type == "cuda"
    size, times, dtype = (2048, 64, torch.bfloat16) if on_gpu else (512, 1, torch.float32)

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize(device)

    def probe() -> float:
        a = torch.ones(size, size, dtype=dtype, device=device)
        out, best = torch.empty_like(a), float("inf")
        for _ in range(3):
            wait()
            started = time.perf_counter()
            for _ in range(times):
                torch.mm(a, a, out=out)
            wait()
            best = min(best, time.perf_counter() - started)
        return best

    return probe
