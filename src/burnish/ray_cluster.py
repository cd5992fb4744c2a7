"""Joining a Ray cluster, or starting one on this machine, for whatever part of a run stands on it.

Ray never notices an actor that hangs, and a node without power only after a minute, so no wait here is without a limit.
Must not know what runs in actors.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

from burnish.errors import UserError

ANSWER_SECONDS = 10.0
"""So long an actor may take for what it does at once."""

OBJECT_STORE_BYTES = 80 << 20
"""Of a cluster that is started here: nothing of a run goes through it, and Ray asks for 75 MiB at least."""

SECRETS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""What opens the cluster is not for the code of a run, but for a rank whose engines stand on it too."""

OF_LAUNCH = "BURNISH_RAY_ADDRESS"
"""In a rank that Ray has placed, and whose recipe has engines on Ray: the address of that cluster."""


class Cluster(NamedTuple):
    """Which cluster, and what it must let its guests do."""

    where: str
    """Path of the block in the recipe that asks for it, for people."""
    address: str | None
    """`auto`, `host:6379`, `ray://host:10001`; None: one is started on this machine for this process alone."""
    num_cpus: float
    """That a cluster which is started here must have, whatever the machine has."""
    allow_unauthenticated: bool = False
    working_dir: str | None = None
    dashboard_port: int | None = None


def connect(cluster: Cluster) -> bool:
    """Joins the cluster, or starts one here; whether this process was not in one already.

    Ray's ports listen on every interface of the machine, so a cluster is never started without a token. The token is
    handed on in the environment, which other users of the machine cannot read; Ray's own file of it they can.

    Raises:
        UserError: Ray is not installed, or the cluster does not let this process in.
    """
    if cluster.address is not None:
        _knock(cluster)
    # All read when Ray is imported. It would print what it sees of every death, beside what the supervisor says.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    if cluster.address is None and not cluster.allow_unauthenticated:
        if "ray" not in sys.modules:  # else it has read them, and 2.59 or newer does the same by itself
            os.environ["RAY_AUTH_MODE"] = "token"
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
        from ray.exceptions import RayError
    except ModuleNotFoundError as error:
        raise UserError(
            f"`{cluster.where}: {{type: ray}}` needs Ray",
            where=f"{cluster.where}.type",
            cure='pip install "burnish[ray]"',
        ) from error
    if ray.is_initialized():
        return False
    options = _options(cluster)
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.CRITICAL)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        cause = str(error).strip().rpartition("\n")[2].strip()
        raise UserError(
            f"the Ray cluster cannot be {'joined' if cluster.address else 'started'}: {cause}",
            where=f"{cluster.where}.address: {cluster.address}" if cluster.address else f"{cluster.where}.type: ray",
            cure="is it up, and are RAY_AUTH_MODE=token and its token in this environment? See docs/ray.md",
        ) from error
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)  # Ray has put one of its own there
    return True


def _options(cluster: Cluster) -> dict[str, Any]:
    options: dict[str, Any] = {"address": cluster.address or "local"}
    if cluster.address is None:
        options["num_cpus"] = max(os.cpu_count() or 1, math.ceil(cluster.num_cpus))
        options["object_store_memory"] = OBJECT_STORE_BYTES
        options |= {"include_dashboard": cluster.dashboard_port is not None, "dashboard_host": "127.0.0.1"}
        if cluster.dashboard_port is not None:
            if find_spec("aiohttp_cors") is None:
                raise UserError(
                    "Ray's dashboard is not installed",
                    where=f"{cluster.where}.dashboard_port",
                    cure='pip install "ray[default]"',
                )
            options["dashboard_port"] = cluster.dashboard_port
    if cluster.working_dir is not None:
        options["runtime_env"] = {"working_dir": cluster.working_dir}
    return options


def _knock(cluster: Cluster) -> None:
    """Raises UserError where nothing listens; Ray itself would try for ten minutes."""
    assert cluster.address is not None
    host, _, port = cluster.address.rpartition("/")[2].rpartition(":")
    if not port.isdecimal():
        return  # `auto`: Ray finds out at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"no Ray cluster listens there: {error.strerror or error}",
            where=f"{cluster.where}.address: {cluster.address}",
            cure="`ray start --head` prints its address; `auto` finds the cluster of this machine",
        ) from error


def answers(refs: Sequence[Any], seconds: float, where: str) -> list[Any]:
    """What actors answered. Raises OSError: not all did in time; UserError: they cannot be made."""
    import ray
    from ray.exceptions import ActorDiedError, RayError

    try:
        return ray.get(list(refs), timeout=seconds)
    except ActorDiedError as error:
        cause = str(error).strip().splitlines()[-1]
        if "creation task" in str(error):
            cure = "the same Burnish, Ray and Python must be on every node"
            raise UserError(f"no actor can be made: {cause}", where=where, cure=cure) from error
        raise OSError(cause) from error
    except RayError as error:
        raise OSError(str(error).strip().splitlines()[-1]) from error


def is_guarded() -> bool:
    """In an actor: whether its cluster asks for a token."""
    return os.environ.get("RAY_AUTH_MODE", "disabled").lower() != "disabled"


def unguarded(where: str) -> UserError:
    """Why a cluster that is not guarded is not joined."""
    return UserError(
        "this Ray cluster asks nobody for a token: whoever reaches its ports can run code on it",
        where=f"{where}.address",
        cure="start all its nodes with RAY_AUTH_MODE=token (docs/ray.md), or say allow_unauthenticated: true",
    )


def actor_options(resources: Mapping[str, float]) -> dict[str, Any]:
    """What Ray sets aside for an actor, in the words of its `options`; it is not started again by Ray."""
    amounts = dict(resources)
    options: dict[str, Any] = {"num_cpus": amounts.pop("CPU", 0.0), "num_gpus": amounts.pop("GPU", 0.0)}
    if "memory" in amounts:
        options["memory"] = amounts.pop("memory")
    return options | {"resources": amounts, "max_restarts": 0}


def shown(resources: Mapping[str, float]) -> str:
    """For people: `1 CPU, 0.5 GPU`."""
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
