"""Ranks on a real Ray cluster: what `launch: {type: ray}` does there, to the second."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from burnish.errors import UserError
from burnish.launch.agent import Place, environments, in_order
from burnish.launch.ray import Ray
from burnish.rollout.workers.ray import Ray as RayWorkers
from tests.ranks import free_port
from tests.ray_helpers import Cluster, opened
from tests.rollout_worker_helpers import assert_complete, collect, requests, tensors
from tests.rollout_worker_helpers import opened as fleet_opened

JOIN = """
import logging, sys, ray
try:
    ray.init(sys.argv[1], logging_level=logging.CRITICAL)
    print("joined")
except Exception as error:
    print("refused", error)
"""


def places(*nodes: str) -> list[Place]:
    """Agents on nodes `10.0.0.1`, `10.0.0.2`...; `1:3` is GPU 3 of the first."""
    split = [node.split(":") for node in nodes]
    return [
        Place(f"node{at}", f"10.0.0.{at}", tuple(gpu), pid=1, interface="eth1", has_folder=True, guarded=True)
        for at, *gpu in split
    ]


def test_ranks_are_ordered_by_node_and_gpu_and_see_the_gpus_of_their_node():
    found = places("2:1", "1:10", "2:0", "1:9")
    order = in_order(found, first="node2")
    assert order == [2, 0, 3, 1]
    first, _, _, last = environments([found[i] for i in order], port=1234)
    shared = {"WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.2", "MASTER_PORT": "1234", "LOCAL_WORLD_SIZE": "2"}
    assert first == shared | {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "GLOO_SOCKET_IFNAME": "eth1",
    }
    assert last == shared | {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "CUDA_VISIBLE_DEVICES": "9,10",
        "GLOO_SOCKET_IFNAME": "eth1",
    }


def test_ranks_of_one_node_speak_over_loopback_alone():
    _, second = environments(places("1", "1"), port=7)
    assert (second["MASTER_ADDR"], second["GLOO_SOCKET_IFNAME"]) == ("127.0.0.1", "lo")
    assert "CUDA_VISIBLE_DEVICES" not in second


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"resources_per_worker": {"GPU": 2}}, "a rank drives one GPU, not 2"),
        ({"resources_per_worker": {"TPU": 1}}, "TPU: a cluster of this machine alone"),
        ({"address": "auto", "dashboard_port": 8265}, "dashboard_port is of a cluster that is started here"),
    ],
)
def test_what_cannot_be_is_refused_in_the_recipe(fields, reason):
    with pytest.raises(ValueError, match=reason):
        Ray.model_validate({"num_workers": 2} | fields)


def test_an_address_where_nothing_listens_is_refused_at_once(tmp_path):
    launch = Ray(num_workers=2, address=f"ray://127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match="no Ray cluster listens there") as refused, opened(launch, tmp_path):
        pass
    assert refused.value.where.startswith("launch.address")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two workers on a cluster of this machine alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)  # the launch says it
        with opened(Ray(num_workers=2), tmp_path_factory.mktemp("orders")) as found:
            yield found


def start_python(code: str, *arguments: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


@pytest.mark.timeout(180)
def test_failing_ranks_are_restarted_and_strangers_are_refused(cluster, tmp_path, capfd):
    import ray

    # HOME, for there may be a token of Ray's own; one try to join, not twenty.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    outside |= {"HOME": str(tmp_path), "RAY_NUM_REDIS_GET_RETRIES": "1"}
    token = {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    address = ray.get_runtime_context().gcs_address
    with (
        start_python(JOIN, address, environment=outside) as stranger,
        start_python(JOIN, address, environment=outside | token) as friend,
    ):
        report = cluster.count(tmp_path, {"1:3": "SIGKILL", "0:5": "bug"})
        assert stranger.communicate(timeout=60)[0].startswith("refused")
        assert friend.communicate(timeout=60)[0] == "joined\n"

    died, failed = [event for event in report.events if event["event"] == "worker_died"]
    assert (died["rank"], died["phase"], died["reason"]) == (1, "step 3", "ended by SIGKILL")
    assert died["at"] - float((tmp_path / "fault-1-3").read_text()) < 1.0
    assert (failed["rank"], failed["reason"]) == (0, "KeyError: 'no such column'")
    assert "suffer_once" in failed["traceback"]
    assert report.events[-1]["event"] == "restarted" and report.events[-1]["seconds"] < 30.0
    out, err = capfd.readouterr()
    assert "rank 0 of 2 begins at 0\n" in out and "rank 0 of 2 begins at 3\n" in out
    assert "[1] rank 1 of 2 begins at 0\n" in err and "SYSTEM_ERROR" not in out + err
    environment = json.loads((tmp_path / "environment1.json").read_text())
    assert (environment["LOCAL_RANK"], environment["OMP_NUM_THREADS"]) == ("1", "1")
    assert "RAY_AUTH_TOKEN" not in environment


@pytest.mark.timeout(180)
@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.long)])
def test_rollout_workers_and_their_actors_may_be_killed(num_workers, cluster, tmp_path, capfd):
    """On the cluster of the ranks, whose agents may hold all its CPUs: these actors ask for none."""
    workers = RayWorkers(num_workers=num_workers, resources_per_worker={"memory": 1.0})
    fleet, events = fleet_opened(workers, tmp_path, step_seconds=0.01)
    try:
        receipts = fleet.publish(1, tensors, None)
        assert [(r.worker, r.version) for r in receipts] == [(f"rollout {i}", 1) for i in range(num_workers)]
        asked, found = requests(range(30), length=10), []
        fleet.submit(asked)
        while len(found) < 20:
            found += fleet.poll(0.1)
        victims = events.pids()
        for pid, what in zip(victims, ["actor", "engine"], strict=False):
            actor = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            os.kill(actor if what == "actor" else pid, signal.SIGKILL)
        found += collect(fleet, 120 - len(found))
        assert_complete(found + fleet.poll(0.3), asked, version=1)
        assert fleet.facts()["restarts"] == num_workers and fleet.facts()["resubmitted"] > 0
    finally:
        fleet.close()
    assert not any(Path(f"/proc/{event['pid']}").exists() for event in events.of("started"))
    reasons = {event["pid"]: event["reason"] for event in events.of("died")}
    assert list(reasons) and set(reasons) == set(victims) and "its actor has ended" in reasons[victims[0]]
    assert num_workers == 1 or "ended by SIGKILL" in reasons[victims[1]]
    err = capfd.readouterr().err
    assert "[rollout 0] knows []\n" in err and "SYSTEM_ERROR" not in err


@pytest.mark.long
@pytest.mark.timeout(300)
def test_hung_ranks_and_agents_are_found_and_replaced(cluster, tmp_path):
    for fault, stopped in (("SIGSTOP", True), ("gil", False)):
        folder = tmp_path / fault
        folder.mkdir()
        report = cluster.count(folder, {"1:3": fault}, heartbeat_seconds=2.0)
        hung, restarted = report.events
        assert (hung["event"], hung["rank"], hung["stopped"]) == ("worker_hung", 1, stopped)
        assert hung["at"] - float((folder / "fault-1-3").read_text()) < 2.0 + 3.0  # 3 s: it is asked for its stacks
        assert "suffer_once" in report.files[hung["stacks"]]
        assert restarted["seconds"] < 30.0


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", ["SIGKILL", "SIGSTOP"])
def test_an_agent_that_is_killed_or_stopped_takes_its_rank_along(fault, cluster, tmp_path, capfd):
    """Rank 0 waits at step 3 for a signal that never comes, so rank 1 waits for it."""
    cluster.order(tmp_path, {"0:3": "wait"})
    group = cluster.actors.start(2, 1)
    until = time.monotonic() + 60.0
    while not (tmp_path / "fault-0-3").exists():
        assert not group.wait(0.1) and time.monotonic() < until
    rank, agent = int((tmp_path / "pid1").read_text()), group._places[1].pid
    struck = time.monotonic()
    os.kill(agent, getattr(signal, fault))
    ended = group.wait(60.0)
    seconds = time.monotonic() - struck
    assert [(each.rank, each.outcome.code) for each in ended] == [(1, -9)]
    assert seconds < (1.0 if fault == "SIGKILL" else cluster.launch.lost_seconds + 2.0)
    assert ("SYSTEM_ERROR" in ended[0].outcome.details) == (fault == "SIGKILL")
    assert "SYSTEM_ERROR" not in ended[0].outcome.words
    group.kill()
    for pid in (rank, agent, int((tmp_path / "pid0").read_text())):
        assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    assert "SYSTEM_ERROR" not in "".join(capfd.readouterr())
    assert cluster.actors.available() == 2
    assert [event["event"] for event in cluster.count(tmp_path, {}).events] == []
