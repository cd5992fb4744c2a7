"""`launch: {type: processes, num_workers: 8}`: ranks on this machine, watched and restarted.

Ranks are forked from one process that has imported everything (`nursery.py`), and find each other over the loopback
interface alone. Rank 0 has this process's output; the others' lines go to its standard error, `[rank]` before each.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from burnish.errors import UserError
from burnish.launch.supervised import Supervised
from burnish.launch.worker_group import Backend, Beat, Ended, Outcome, Stack

if TYPE_CHECKING:
    from burnish.launch.heartbeat import BeatBoard
    from burnish.launch.nursery import News
    from burnish.recipe import Recipe

MODULES = (
    "torch.distributed.fsdp",
    "transformers.modeling_layers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "burnish.data.stream",
    "burnish.launch.rank",
    "burnish.launch.second",
    "burnish.model.export",
    "burnish.policy.checkpoint",
    "burnish.policy.policy",
    "burnish.recipe",
    "burnish.workflows.run",
)
"""What nearly every rank imports. Of the 211 modules that a small run adds to torch, 63 are left to a restart."""

ANSWER_SECONDS = 1.0
"""A rank that can answer writes its stacks within milliseconds of being asked."""

KILL_SECONDS = 10.0
"""A killed process is gone in milliseconds, unless the kernel waits for a disk or a device on its behalf."""


class Processes(Supervised):
    """Ranks on this machine, one for each GPU where there are some."""

    type: Literal["processes"] = "processes"

    def backend(self, recipe: Recipe, work: Callable[[Callable[[str], None]], int], largest: int) -> Backend:
        least, gpus = self.elastic.min_workers if self.elastic else self.num_workers, num_gpus()
        if 0 < gpus < least:
            cure = f"launch.num_workers: {gpus}, or `launch: {{type: ray, ...}}` for several machines"
            raise UserError(f"{least} ranks need a GPU each, and this machine has {gpus}", "launch.num_workers", cure)
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        modules = MODULES if recipe.model.adapter is None else (*MODULES, "peft")
        return LocalProcesses(work, largest, modules=modules, threads=cores // self.num_workers, most=self.num_workers)


class LocalProcesses:
    """Starts ranks on this machine. Must be made, and used, in the main thread: ranks end with the thread.

    Args:
        work: what each rank does; pickled by name.
        largest: the most ranks of an attempt.
        modules: imported once, before the first rank.
        threads: of each rank's operators on a CPU, unless OMP_NUM_THREADS says it.
        most: ranks that a machine without GPUs has room for.
        outputs: file descriptors for what the ranks print; None: this process's.
    """

    def __init__(
        self,
        work: Callable[[Callable[[str], None]], int],
        largest: int,
        *,
        modules: Sequence[str] = (),
        threads: int = 1,
        most: int | None = None,
        outputs: tuple[int | None, int | None] = (None, None),
    ) -> None:
        from burnish.launch.heartbeat import BeatBoard

        self.assign(work)
        self._modules, self._most, self._outputs = list(modules), most or largest, outputs
        # Read when torch is imported, so it is said to the nursery; the same at any number of ranks, for the same bits.
        self._environment = {"OMP_NUM_THREADS": str(max(threads, 1))} | os.environ
        if sys.platform == "linux":
            self._environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        self._board = BeatBoard.create(largest)
        self._nursery = NurseryProcess(self._board, self._modules, self._environment, outputs)

    def assign(self, work: Callable[[Callable[[str], None]], int]) -> None:
        """What the ranks of later groups do."""
        self._work = pickle.dumps(work)

    def start(self, size: int, attempt: int) -> ProcessGroup:
        """See `Backend`; `attempt` is of no use here, since the ranks of the last one are dead."""
        from burnish.launch.nursery import Birth

        if not self._nursery.alive():
            self._nursery.end()
            self._nursery = NurseryProcess(self._board, self._modules, self._environment, self._outputs)
        self._board.clear()
        shared = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank in range(size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self._nursery.connection.send(Birth(rank, shared | own, self._work))
        return ProcessGroup(self._nursery, self._board, size)

    def available(self) -> int:
        """As many as there are GPUs; without any, as many as were asked for."""
        return num_gpus() or self._most

    def close(self) -> None:
        self._nursery.end()
        self._board.close()


class NurseryProcess:
    """The nursery, seen from here."""

    def __init__(
        self,
        board: BeatBoard,
        modules: list[str],
        environment: dict[str, str],
        outputs: tuple[int | None, int | None] = (None, None),
    ) -> None:
        """`outputs`: what it and its rank 0 have for standard output and error; None: this process's."""
        self.connection, theirs = Pipe()
        handed = (theirs.fileno(), board.fd)
        code = f"import sys; sys.path[:] = {sys.path}; import burnish.launch.nursery as n; n.main{(*handed, modules)}"
        # With this process's path, and not what lies in the current folder before it (-P), where a random.py may lie.
        command = [sys.executable, "-P", "-c", code]
        out, err = outputs
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment, pass_fds=handed
        )
        theirs.close()

    def alive(self) -> bool:
        return self._process.poll() is None

    def news(self, seconds: float) -> News | None:
        """The next, within so many seconds. Raises EOFError once it has ended."""
        try:
            return self.connection.recv() if self.connection.poll(seconds) else None
        except ConnectionError as error:
            raise EOFError from error

    def end(self) -> None:
        """Kills it; its ranks end with it."""
        self._process.kill()
        self._process.wait()
        self.connection.close()


class ProcessGroup:
    """Ranks that a nursery has forked, or is about to; `pids` are those of the ones that run."""

    def __init__(self, nursery: NurseryProcess, board: BeatBoard, size: int) -> None:
        self.size, self.pids = size, dict[int, int]()
        self._nursery, self._board = nursery, board
        self._running = set(range(size))
        self._news: list[Ended] = []
        self._traces = dict.fromkeys(range(size), "")

    def wait(self, seconds: float) -> list[Ended]:
        """See `WorkerGroup`."""
        until = time.monotonic() + seconds
        while not self._news and self._hear(max(until - time.monotonic(), 0.0)):
            pass
        while self._hear(0.0):
            pass
        news, self._news = self._news, []
        return news

    def beats(self) -> list[Beat]:
        """See `WorkerGroup`."""
        return self._board.read(self.size)

    def stop(self) -> None:
        """See `WorkerGroup`."""
        self._signal(self._running, signal.SIGTERM)

    def stacks(self, ranks: Sequence[int]) -> dict[int, Stack]:
        """See `WorkerGroup`. A stopped rank is continued: it answers before it does anything else."""
        self._traces = dict.fromkeys(range(self.size), "")
        self._signal(ranks, signal.SIGUSR1)
        self._listen(ranks)
        silent = [rank for rank in ranks if not self._traces[rank]]
        self._signal(silent, signal.SIGCONT)
        self._listen(silent)
        return {rank: Stack(self._traces[rank], rank in silent) for rank in ranks}

    def kill(self) -> None:
        """See `WorkerGroup`."""
        if len(self.pids) < self.size and self._running:
            return self._end_nursery()  # it still imports, and would fork ranks only to kill them
        self._signal(self._running, signal.SIGKILL)
        until = time.monotonic() + KILL_SECONDS
        while self._running and time.monotonic() < until:
            self._hear(0.1)
        if self._running:
            self._end_nursery()

    def _end_nursery(self) -> None:
        self._nursery.end()
        self._running.clear()

    def _signal(self, ranks: Sequence[int] | set[int], number: int) -> None:
        from burnish.launch.nursery import Kill

        with contextlib.suppress(OSError):  # the nursery is dead, and its ranks with it; `_hear` says so
            self._nursery.connection.send(Kill(list(ranks), number))

    def _listen(self, ranks: Sequence[int]) -> None:
        """Hears until all of `ranks` have answered and nothing follows, or the time is over."""
        until = time.monotonic() + ANSWER_SECONDS
        while ranks and time.monotonic() < until and self._running:
            heard = self._hear(0.1)
            if not heard and all(self._traces[rank] for rank in ranks):
                break

    def _hear(self, seconds: float) -> bool:
        """Takes in the next news, if there is some within so many seconds."""
        from burnish.launch.nursery import Born, Trace

        if not self._running:
            return False
        try:
            news = self._nursery.news(seconds)
        except EOFError:
            lost = Outcome(-signal.SIGKILL, "the process that ranks are forked from has ended")
            self._news += [Ended(rank, lost) for rank in sorted(self._running)]
            self._running.clear()
            return True
        if isinstance(news, Born):
            self.pids[news.rank] = news.pid
        elif isinstance(news, Trace):
            self._traces[news.rank] += news.text
        elif news is not None:
            self._running.discard(news.rank)
            self._news.append(news)
        return news is not None


def num_gpus(devices: Path = Path("/dev")) -> int:
    """Device files of NVIDIA's driver, of which a container has those it was given, less what CUDA_VISIBLE_DEVICES
    hides. Without CUDA, which could not be used in a fork once it was asked."""
    count = len([path for path in devices.glob("nvidia*") if path.name.removeprefix("nvidia").isdecimal()])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return count if visible is None else min(count, len([name for name in visible.split(",") if name.strip()]))


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
