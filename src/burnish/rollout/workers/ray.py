"""`workers: {type: ray, num_workers: 4, address: auto}`: engines on the nodes of a Ray cluster, watched and restarted.

An actor stands for each engine, which runs in a process below it (`host.py`), as with `processes`: so the actor always
answers, a crash of the engine leaves somebody who can tell, and a hung one can be asked where it stands. Ray never
notices an actor that hangs; here one that is not heard of for `heartbeat_seconds` is.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self

from annotated_types import Gt, MinLen
from pydantic import model_validator
from pydantic_core import PydanticCustomError

from burnish.errors import UserError
from burnish.ray_cluster import (
    ANSWER_SECONDS,
    OF_LAUNCH,
    SECRETS,
    Cluster,
    actor_options,
    answers,
    connect,
    is_guarded,
    shown,
    unguarded,
)
from burnish.rollout.host_process import Heard, ProcessLink, ProcessStarter, listen
from burnish.rollout.workers.watched import Watched

if TYPE_CHECKING:
    from burnish.rollout.fleet import Fleet, Parts

WHERE = "workflow.rollout.workers"

LISTEN_SECONDS = 5.0
"""Longest that an actor listens to its engine's process before it answers; what is said is passed on at once."""

KILL_SECONDS = 3.0
"""An actor that answers has killed its process within milliseconds; one that does not is killed with it."""

NOTHING = Heard([], [], None)


class Ray(Watched):
    """Engines on a Ray cluster: an actor for each."""

    type: Literal["ray"] = "ray"
    address: Annotated[str, MinLen(1)] | None = None
    """Of a running cluster: `auto`, `host:6379`, `ray://host:10001`; absent: the one that `launch: {type: ray}` stands
    on, or else one that is started on this machine for this run alone."""
    resources_per_worker: Annotated[dict[str, Annotated[float, Gt(0)]], MinLen(1)] | Literal["auto"] = "auto"
    """What Ray sets aside for an engine, in Ray's names: `{GPU: 1, CPU: 8}`. CPU is also its number of threads. `auto`:
    a CPU, and a GPU where the cluster has some."""
    working_dir: Annotated[str, MinLen(1)] | None = None
    """Folder that is sent to every node, so that `type: module:Class` is found there; absent: nothing is sent."""
    allow_unauthenticated: bool = False
    """Join a cluster that asks nobody for a token. Whoever reaches its ports can run code on it."""

    @model_validator(mode="after")
    def _resources_are_those_of_this_machine(self) -> Self:
        needed = {} if self.resources_per_worker == "auto" else self.resources_per_worker
        odd = [name for name in needed if name not in ("CPU", "GPU", "memory")]
        if self.address is None and odd:
            raise PydanticCustomError(
                "resource", "{odd}: a cluster of this machine alone has CPU, GPU and memory", {"odd": ", ".join(odd)}
            )
        return self

    def open(self, parts: Parts) -> Fleet:
        return self.pool(RayStarter(self), parts)

    def cluster(self) -> Cluster:
        """The cluster that it stands on."""
        asked = {} if self.resources_per_worker == "auto" else self.resources_per_worker
        cpus = self.num_workers * asked.get("CPU", 1)
        address = self.address or os.environ.get(OF_LAUNCH)
        return Cluster(WHERE, address, cpus, self.allow_unauthenticated, self.working_dir)


class RayStarter:
    """Makes actors on a cluster that it joins, or starts where the workers name none.

    Raises:
        UserError: Ray is not installed, the cluster cannot be joined, or it is too small.
    """

    def __init__(self, workers: Ray) -> None:
        import ray

        self._workers = workers
        self._opened = connect(workers.cluster())
        total = ray.cluster_resources()
        asked = workers.resources_per_worker
        auto = {"CPU": 1.0} | ({"GPU": 1.0} if total.get("GPU", 0.0) >= 1 else {})
        self._bundle: dict[str, float] = auto if asked == "auto" else asked
        room = min(int(total.get(name, 0.0) / amount + 1e-9) for name, amount in self._bundle.items())
        if room < workers.num_workers:
            self.close()
            raise UserError(
                f"the cluster has room for {room} workers with {shown(self._bundle)} each",
                where=f"{WHERE}.num_workers",
                cure=f"start fewer, ask for less in {WHERE}.resources_per_worker, or join a larger cluster",
            )

    def start(self, index: int, order: bytes) -> RayLink:
        """Asks for an actor, which there may be no room for yet."""
        import ray

        maker = ray.remote(RayWorker).options(max_concurrency=4, **actor_options(self._bundle))
        made: Any = maker.remote(os.getcwd(), sys.path)
        return RayLink(made, made.start.remote(index, order), guarded=not self._workers.allow_unauthenticated)

    def wait(self, links: Sequence[RayLink], seconds: float) -> None:
        """Returns when something came from one of them, or after `seconds`."""
        import ray

        refs = [ref for link in links for ref in link.waited_for()]
        if refs:
            ray.wait(refs, num_returns=1, timeout=seconds)
        else:
            time.sleep(seconds)

    def close(self) -> None:
        """A cluster that was started here is gone when this returns."""
        import ray

        if self._opened and ray.is_initialized():
            ray.shutdown()


class Begun(NamedTuple):
    """Where an actor has started its engine's process."""

    pid: int | None
    address: str
    guarded: bool


class RayWorker:
    """The actor of an engine: starts its process, and carries what the two ends say. Never runs what the engine runs.

    Args:
        folder: current folder of the engine, where this machine has it.
        path: of modules, as where the run was started; what of it this machine has comes last.
    """

    def __init__(self, folder: str, path: Sequence[str]) -> None:
        if os.path.isdir(folder):
            os.chdir(folder)
        sys.path += [each for each in path if each not in sys.path and os.path.isabs(each) and os.path.isdir(each)]
        self._link: ProcessLink
        # Ray sets OMP_NUM_THREADS to the CPUs of the actor, and CUDA_VISIBLE_DEVICES to its GPUs.
        self._starter = ProcessStarter({}, without=SECRETS)

    def start(self, index: int, order: bytes) -> Begun:
        """Starts the process with its first frame."""
        import ray

        self._link = self._starter.start(index, order)
        return Begun(self._link.pid, ray.util.get_node_ip_address(), is_guarded())

    def send(self, frames: Sequence[bytes]) -> None:
        """Frames for the process, in order."""
        for frame in frames:
            self._link.send(frame)

    def hear(self, seconds: float) -> Heard:
        """What came, as soon as something did; nothing after `seconds`."""
        until = time.monotonic() + seconds
        while (heard := self._link.hear()) == NOTHING and (left := until - time.monotonic()) > 0:
            listen([self._link], min(left, 0.1))
        return heard

    def ask(self) -> None:
        """Has the process print where it stands."""
        self._link.ask()

    def kill(self) -> None:
        """Ends the process and what it started."""
        self._link.kill()


class RayLink:
    """A worker behind an actor. At most one call of each kind is on its way, so what is said keeps its order.

    Args:
        begun: the call that starts the process.
        guarded: refuse an actor whose cluster asks nobody for a token.
    """

    def __init__(self, actor: Any, begun: Any, *, guarded: bool) -> None:
        self._actor, self._begun, self._guarded = actor, begun, guarded
        self._hearing: Any = None
        self._sending: Any = None
        self._unsent: list[bytes] = []
        self._ended: str | None = None
        self.pid: int | None = None
        self.place = "an actor that is not there yet"

    def waited_for(self) -> list[Any]:
        """Calls whose answer is news."""
        if self._ended is not None:
            return []
        if self._begun is not None:
            return [self._begun]
        return [self._hearing, *([self._sending] if self._unsent else [])]

    def send(self, frame: bytes) -> None:
        """See `Link`."""
        self._unsent.append(frame)
        self._push()

    def hear(self) -> Heard:
        """See `Link`. Raises UserError: no actor can be made, or its cluster is open to everybody."""
        if self._ended is not None:
            return Heard([], [], self._ended)
        try:
            if self._begun is not None:
                if not _is_there(self._begun):
                    return NOTHING
                self._begin()
            heard = NOTHING
            if _is_there(self._hearing):
                (heard,) = answers([self._hearing], ANSWER_SECONDS, WHERE)
                self._hearing = self._actor.hear.remote(LISTEN_SECONDS)
            self._push()
        except OSError as error:  # what was on its way is lost, so the worker is too
            heard = Heard([], [], f"its actor has ended: {error}")
        self._ended = heard.ended
        return heard

    def ask(self) -> None:
        """See `Link`."""
        self._actor.ask.remote()

    def kill(self) -> None:
        """See `Link`."""
        import ray
        from ray.exceptions import RayError

        with contextlib.suppress(RayError):
            if self._begun is None:
                ray.wait([self._actor.kill.remote()], timeout=KILL_SECONDS)
            ray.kill(self._actor, no_restart=True)
        self._ended = "it was killed"

    def _begin(self) -> None:
        (begun,) = answers([self._begun], ANSWER_SECONDS, WHERE)
        self._begun = None
        self.pid, self.place = begun.pid, f"process {begun.pid} on {begun.address}"
        if self._guarded and not begun.guarded:
            raise unguarded(WHERE)
        self._hearing = self._actor.hear.remote(LISTEN_SECONDS)

    def _push(self) -> None:
        if self._begun is None and self._unsent and (self._sending is None or _is_there(self._sending)):
            self._sending = self._actor.send.remote(self._unsent)
            self._unsent = []


def _is_there(ref: Any) -> bool:
    import ray

    return bool(ray.wait([ref], timeout=0)[0])
