"""`launch: {type: ray, num_workers: 16, address: auto}`: ranks on the nodes of a Ray cluster, watched and restarted.

Ray places an actor for each rank, says when one is gone, and carries calls; what an actor does is in `agent.py`, what
follows from a death or a hang in `supervise.py`, how a cluster is joined in `ray_cluster.py`. No wait here is without a
limit.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from annotated_types import Gt, MinLen
from pydantic import model_validator
from pydantic_core import PydanticCustomError

from burnish.errors import UserError
from burnish.launch.agent import Agent, Place, end_agent, environments, free_port, in_order, interface_of
from burnish.launch.agent_group import AgentGroup, Gone
from burnish.launch.supervised import Supervised
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
from burnish.rollout.workers.ray import Ray as Engines
from burnish.workflows.on_policy import OnPolicy

if TYPE_CHECKING:
    from burnish.launch.worker_group import Backend
    from burnish.recipe import Recipe

PLACE_SECONDS = 60.0
"""So long a cluster may take to find room for all actors together, on nodes that are there."""

MAKE_SECONDS = 120.0
"""So long it may take to start an actor's process, with the files of `working_dir` on the way to its node."""

END_SECONDS = 8.0
"""A node that answers has killed an actor within so long: it starts a process for it, in a second or two."""


class Ray(Supervised):
    """Ranks on a Ray cluster: an actor for each in one placement group."""

    type: Literal["ray"] = "ray"
    address: Annotated[str, MinLen(1)] | None = None
    """Of a running cluster: `auto`, `host:6379`, `ray://host:10001`; absent: one is started on this machine for this
    run alone."""
    resources_per_worker: Annotated[dict[str, Annotated[float, Gt(0)]], MinLen(1)] | Literal["auto"] = "auto"
    """What Ray sets aside for a rank, in Ray's names: `{GPU: 1, CPU: 8}`. CPU is also a rank's number of threads.
    `auto`: a CPU, and a GPU where the cluster has some."""
    placement: Literal["pack", "spread"] = "pack"
    """`pack`: on as few nodes as will do. `spread`: each rank on a node of its own."""
    working_dir: Annotated[str, MinLen(1)] | None = None
    """Folder that is sent to every node, so that `type: module:Class` is found there; absent: nothing is sent."""
    lost_seconds: Annotated[float, Gt(0)] = 12.0
    """An actor that does not answer for so long is lost, and its node with it."""
    allow_unauthenticated: bool = False
    """Join a cluster that asks nobody for a token. Whoever reaches its ports can run code on it."""
    dashboard_port: Annotated[int, Gt(0)] | None = None
    """Port of Ray's dashboard on 127.0.0.1, of a cluster that is started here; absent: none."""

    @model_validator(mode="after")
    def _resources_are_those_of_a_rank(self) -> Self:
        needed = {} if self.resources_per_worker == "auto" else self.resources_per_worker
        if needed.get("GPU", 1) != 1:
            raise PydanticCustomError(
                "gpu", "a rank drives one GPU, not {given}: start more workers", {"given": needed["GPU"]}
            )
        odd = [name for name in needed if name not in ("CPU", "GPU", "memory")]
        if self.address is None and odd:
            raise PydanticCustomError(
                "resource", "{odd}: a cluster of this machine alone has CPU, GPU and memory", {"odd": ", ".join(odd)}
            )
        if self.address is not None and self.dashboard_port is not None:
            raise PydanticCustomError("dashboard", "dashboard_port is of a cluster that is started here, not joined")
        return self

    def cluster(self, largest: int, engines: Engines | None = None) -> Cluster:
        """The cluster of a run with so many ranks at most, and its engines if they name no other one."""
        asked = {} if self.resources_per_worker == "auto" else self.resources_per_worker
        beside = 0.0 if engines is None or engines.address is not None else engines.cluster().num_cpus
        return Cluster(
            "launch",
            self.address,
            largest * asked.get("CPU", 1) + beside,
            self.allow_unauthenticated,
            self.working_dir,
            self.dashboard_port,
        )

    def backend(self, recipe: Recipe, work: Callable[[Callable[[str], None]], int], largest: int) -> Backend:
        from burnish.launch.processes import MODULES

        modules = MODULES if recipe.model.adapter is None else (*MODULES, "peft")
        workers = recipe.workflow.rollout.workers if isinstance(recipe.workflow, OnPolicy) else None
        engines = workers if isinstance(workers, Engines) else None
        needs_folder = not os.path.isabs(recipe.run_dir)
        return RayActors(self, work, largest, modules=modules, needs_folder=needs_folder, engines=engines)


class RayActors:
    """Starts ranks on a Ray cluster, which it joins, or starts where the launch names none.

    Args:
        work: what each rank does; pickled by name.
        largest: the most ranks of an attempt.
        modules: imported once by every agent's nursery.
        needs_folder: the run's paths begin at the current folder, so every node must have it.
        engines: what rank 0 is going to start on the same cluster.

    Raises:
        UserError: Ray is not installed, or the cluster cannot be joined.
    """

    def __init__(
        self,
        launch: Ray,
        work: Callable[[Callable[[str], None]], int],
        largest: int,
        *,
        modules: Sequence[str] = (),
        needs_folder: bool = False,
        engines: Engines | None = None,
    ) -> None:
        self._launch, self._work, self._modules, self._needs_folder = launch, pickle.dumps(work), modules, needs_folder
        self._opened = connect(launch.cluster(largest, engines))
        self._is_admitted = engines is not None
        self._agents: list[Any] = []
        self._nodes: list[str] = []
        """Of the agents."""
        self._lost_nodes: set[str] = set()
        """Did not answer; a node that comes back has another name."""
        self._placement: Any = None
        self._bundle = self._resources()
        room = self.available()
        if launch.address is None and room < launch.num_workers:
            self.close()
            raise UserError(
                f"this machine has room for {room} workers with {shown(self._bundle)} each",
                where="launch.num_workers",
                cure="start fewer, ask for less in launch.resources_per_worker, or join a cluster: launch.address",
            )

    def start(self, size: int, attempt: int) -> AgentGroup:
        """See `Backend`. Agents that still answer are used again: their ranks then start without an import."""
        import ray

        places = self._places(size)
        self._refuse(places)
        order = in_order(places, ray.get_runtime_context().get_node_id())
        places, self._agents = [places[i] for i in order], [self._agents[i] for i in order]
        self._nodes = [place.node for place in places]
        master = "127.0.0.1" if len(set(self._nodes)) == 1 else places[0].address
        (port,) = answers([self._agents[0].port.remote(master)], ANSWER_SECONDS, "launch")
        started = [
            agent.start.remote(environment, self._work)
            for agent, environment in zip(self._agents, environments(places, port), strict=True)
        ]
        answers(started, ANSWER_SECONDS, "launch")
        return AgentGroup(RayCarrier(self._agents, places), places, self._launch.lost_seconds, self._lost_nodes)

    def available(self) -> int:
        """See `Backend`. What other jobs hold is known for the whole cluster only, so there may be room for fewer."""
        import ray

        alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        alive = {name: resources for name, resources in alive.items() if name not in self._lost_nodes}
        bins = [self._bins(resources) for resources in alive.values()]
        whole = sum(min(each, 1) if self._launch.placement == "spread" else each for each in bins)
        held = sum(node in alive for node in self._nodes)
        return min(whole, held + self._bins(ray.available_resources()))

    def close(self) -> None:
        """See `Backend`. A cluster that was started here is gone when this returns."""
        import ray

        if ray.is_initialized():
            self._dissolve()
            if self._opened:
                ray.shutdown()

    def _bins(self, resources: Mapping[str, float]) -> int:
        return min(int(resources.get(name, 0.0) / amount + 1e-9) for name, amount in self._bundle.items())

    def _resources(self) -> dict[str, float]:
        import ray

        if self._launch.resources_per_worker != "auto":
            return self._launch.resources_per_worker
        return {"CPU": 1.0} | ({"GPU": 1.0} if ray.cluster_resources().get("GPU", 0.0) >= 1 else {})

    def _places(self, size: int) -> list[Place]:
        """Where the agents stand: those of the last attempt if all of them answer, else new ones. Raises OSError."""
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        if len(self._agents) == size:
            try:
                return answers([agent.place.remote() for agent in self._agents], ANSWER_SECONDS, "launch")
            except OSError:
                pass  # the node of one is gone: all are placed anew
        self._dissolve()
        strategy = "STRICT_SPREAD" if self._launch.placement == "spread" else "PACK"
        # Ray goes on placing actors on a node that does not answer until it has found it dead, up to a minute later.
        elsewhere: dict[str, Any] = {}
        if self._lost_nodes:
            not_there = {"ray.io/node-id": f"!in({','.join(sorted(self._lost_nodes))})"}
            elsewhere = {"bundle_label_selector": [not_there] * size}
        self._placement = placement_group([self._bundle] * size, strategy=strategy, **elsewhere)
        if not self._placement.wait(PLACE_SECONDS):
            self._dissolve()
            raise OSError(f"the cluster has no room for {size} actors with {shown(self._bundle)} each")
        options = actor_options(self._bundle)
        for index in range(size):
            where = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=index)
            made = ray.remote(RayAgent).options(scheduling_strategy=where, **options)
            self._agents.append(made.remote(self._modules, os.getcwd(), sys.path, self._is_admitted))
        try:
            return answers([agent.place.remote() for agent in self._agents], MAKE_SECONDS, "launch")
        except OSError:
            self._dissolve()
            raise

    def _dissolve(self) -> None:
        """Gives back the placement group; its actors die with it, and their ranks with them."""
        import ray
        from ray.util.placement_group import remove_placement_group

        for agent in self._agents:
            ray.kill(agent, no_restart=True)
        if self._placement is not None:
            remove_placement_group(self._placement)
        self._agents, self._nodes, self._placement = [], [], None

    def _refuse(self, places: Sequence[Place]) -> None:
        """Raises UserError where a person has to change something before any rank can run."""
        if not self._launch.allow_unauthenticated and not all(place.guarded for place in places):
            raise unguarded("launch")
        without = sorted({place.address for place in places if not place.has_folder})
        if without and self._needs_folder:
            raise UserError(
                f"{os.getcwd()} is not on {', '.join(without)}, and run_dir is a path in it",
                where="run_dir",
                cure="start from a folder that all nodes share, or give an absolute run_dir on one",
            )


class RayCarrier:
    """Calls to actors; see `Carrier`."""

    def __init__(self, agents: Sequence[Any], places: Sequence[Place]) -> None:
        self._agents, self._places = list(agents), list(places)

    def call(self, rank: int, method: str, *arguments: Any) -> Any:
        return getattr(self._agents[rank], method).remote(*arguments)

    def answered(self, calls: Sequence[Any], seconds: float) -> list[Any]:
        import ray

        first, rest = ray.wait(list(calls), timeout=seconds)
        return first + (ray.wait(rest, num_returns=len(rest), timeout=0)[0] if rest else [])

    def answer(self, call: Any) -> Any:
        import ray
        from ray.exceptions import ActorUnavailableError, RayActorError

        try:
            return ray.get(call, timeout=ANSWER_SECONDS)
        except ActorUnavailableError as error:  # a connection broke: the node is gone, or the network stumbled
            raise OSError(str(error)) from error
        except RayActorError as error:
            raise Gone(str(error)) from error

    def end(self, ranks: Sequence[int]) -> list[int]:
        """From another process of their node: Ray itself takes 5 s to kill an actor that was stopped (2.60)."""
        import ray
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        ended = {}
        for rank in ranks:
            node = NodeAffinitySchedulingStrategy(self._places[rank].node, soft=False)
            end = ray.remote(end_agent).options(num_cpus=0, max_retries=0, scheduling_strategy=node)
            ended[end.remote(self._places[rank].pid, RayAgent.__name__)] = rank
        found = []
        for call in ray.wait(list(ended), num_returns=len(ended), timeout=END_SECONDS)[0]:
            with contextlib.suppress(RayError):  # the node is gone
                ray.get(call, timeout=ANSWER_SECONDS)
                found.append(ended[call])
        return found


class RayAgent(Agent):
    """An agent that Ray has placed.

    Args:
        is_admitted: its rank may start engines on the cluster.
    """

    def __init__(self, modules: Sequence[str], folder: str, path: Sequence[str], is_admitted: bool) -> None:
        import ray

        if is_admitted:
            os.environ[OF_LAUNCH] = ray.get_runtime_context().gcs_address
        super().__init__(modules, folder, path, without=() if is_admitted else SECRETS)

    def place(self) -> Place:
        """Where it stands."""
        import ray

        context = ray.get_runtime_context()
        address = ray.util.get_node_ip_address()
        return Place(
            context.get_node_id(),
            address,
            tuple(context.get_accelerator_ids().get("GPU", ())),
            os.getpid(),
            interface_of(address),
            self.has_folder,
            is_guarded(),
        )

    def port(self, address: str) -> int:
        """See `free_port`."""
        return free_port(address)
