"""Ray clusters of several nodes on this machine: nodes that die, other ways in, and a whole recipe."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from burnish.launch.ray import Ray
from burnish.rollout.workers.ray import Ray as RayWorkers
from tests import rl_helpers, tiny_run
from tests.e2e_helpers import events
from tests.ranks import free_port
from tests.ray_helpers import opened
from tests.rollout_worker_helpers import assert_complete, collect, requests, tensors
from tests.rollout_worker_helpers import opened as fleet_opened
from tests.supervision_helpers import Recorded
from tests.zygote import wait_until

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(400),
    # Ray leaves log files open when it starts nodes in this process, which only tests do.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A cluster with a token: its head runs no ranks, two nodes have room for one each."""
    os.environ["RAY_AUTH_MODE"] = "token"  # before Ray is imported
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    head = small | {"num_cpus": 0, "ray_client_server_port": free_port()}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.client_port = head["ray_client_server_port"]
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=small["object_store_memory"])
    try:
        yield cluster
    finally:
        cluster.shutdown()


def later(condition: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Does it beside the test, once the condition holds."""

    def run() -> None:
        wait_until(condition, 120.0)
        act()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize("silently", [False, True], ids=["killed", "silent"])
def test_a_node_that_dies_leaves_a_smaller_run_that_can_grow_again(silently, nodes, tmp_path):
    launch = Ray(num_workers=2, address=nodes.address, lost_seconds=5.0 if silently else 12.0)
    report, struck = Recorded(), []
    with opened(launch, tmp_path) as cluster:

        def strike() -> None:
            lost = cluster.actors._nodes[1]
            (node,) = [each for each in nodes.worker_nodes if each.node_id == lost]
            struck.append(time.monotonic())
            if silently:  # as a machine without power: nothing answers, nothing closes its connections
                raylet = node.all_processes["raylet"][0].process.pid
                for pid in [raylet, *_below(raylet)]:
                    os.kill(pid, signal.SIGSTOP)
            else:
                nodes.remove_node(node, allow_graceful=False)

        thread = later((tmp_path / "fault-0-3").exists, strike)
        cluster.count(tmp_path, {"0:3": "wait"}, sizes=(1, 2), report=report)
        thread.join()
        died, resized, restarted = report.events
        assert (died["event"], died["rank"], died["reason"][:16]) == ("worker_died", 1, "ended by SIGKILL")
        assert died["at"] - struck[0] < 15.0
        assert (resized["event"], resized["before"], resized["ranks"]) == ("resized", 2, 1)
        assert (restarted["event"], restarted["ranks"]) == ("restarted", 1)
        assert restarted["seconds"] < 30.0
        assert cluster.actors.available() == 1
        nodes.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        wait_until(lambda: cluster.actors.available() == 2, 30.0)
        assert cluster.count(tmp_path, {}).events == []


def test_an_engine_whose_node_dies_is_missed_by_nobody_and_comes_back_with_a_node(nodes, tmp_path):
    limits = {"heartbeat_seconds": 5.0, "start_seconds": 10.0, "max_restarts": 1}
    workers = RayWorkers(num_workers=2, address=nodes.address, **limits)
    fleet, told = fleet_opened(workers, tmp_path, step_seconds=0.02)
    try:
        fleet.publish(1, tensors, None)
        asked, found = requests(range(30), length=10), []
        fleet.submit(asked)
        while len(found) < 20:
            found += fleet.poll(0.1)
        raylets = {node.all_processes["raylet"][0].process.pid: node for node in nodes.worker_nodes}
        (struck,) = [node for raylet, node in raylets.items() if told.pids()[1] in _below(raylet)]
        nodes.remove_node(struck, allow_graceful=False)
        found += collect(fleet, 120 - len(found), seconds=60.0)
        assert_complete(found + fleet.poll(0.3), asked, version=1)
        # Nothing but its machine is wrong with it: it is asked for again, however often, while the other one works.
        asked = requests(range(30, 60), length=10)
        while len(told.of("hung")) < 3:
            fleet.submit(asked)
            assert_complete(collect(fleet, 120), asked, version=1)
        nodes.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        wait_until(lambda: fleet.poll(0.1) == [] and fleet.facts()["workers"] == 2, 60.0)
    finally:
        fleet.close()
    assert len(told.of("started")) == 3 and len(told.of("refitted")) == 1


def _below(pid: int) -> list[int]:
    """All processes that a process started, and that those started."""
    found = [pid]
    for member in found:
        for children in Path(f"/proc/{member}/task").glob("*/children"):
            found += [int(child) for child in children.read_text().split()]
    return found[1:]


def test_ranks_spread_over_nodes_through_a_client(nodes, tmp_path):
    """`ray://`: this process is no part of the cluster. A module that only `working_dir` has is there, too."""
    sent = tmp_path / "sent"
    sent.mkdir()
    (sent / "only_sent.py").write_text("")
    port = nodes.client_port
    wait_until(lambda: listens(port))
    launch = Ray(num_workers=2, address=f"ray://127.0.0.1:{port}", placement="spread", working_dir=str(sent))
    with opened(launch, tmp_path) as cluster:
        report = cluster.count(tmp_path, {"1:3": "SIGKILL"}, modules=("only_sent",))
        assert [event["event"] for event in report.events] == ["worker_died", "restarted"]
        assert len(set(cluster.actors._nodes)) == 2


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


OPEN_CLUSTER = """
import sys
from pathlib import Path
from ray.cluster_utils import Cluster
from burnish.errors import UserError
from burnish.launch.ray import Ray
from tests.ray_helpers import opened
from tests.rollout_worker_helpers import assert_complete, collect, requests, tensors
from tests.rollout_worker_helpers import opened as fleet_opened

small = {"num_cpus": 2, "object_store_memory": 80 * 2**20, "include_dashboard": False}
nodes = Cluster(initialize_head=True, head_node_args=small)
folder = Path(sys.argv[1])
try:
    with opened(Ray(num_workers=2, address=nodes.address), folder) as cluster:
        cluster.count(folder, {})
except UserError as error:
    print(error)
with opened(Ray(num_workers=2, address=nodes.address, allow_unauthenticated=True), folder) as cluster:
    cluster.count(folder, {})
    print("counted")
nodes.shutdown()
"""


def test_a_cluster_without_a_token_is_joined_only_if_the_recipe_says_so(tmp_path):
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", OPEN_CLUSTER, str(tmp_path)],
        env=outside | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": "."},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert "launch.address: this Ray cluster asks nobody for a token" in done.stdout, done.stderr
    assert done.stdout.endswith("counted\n")


def _ranks(driver: int) -> list[int]:
    """The ranks of a run whose cluster this driver has started: forks of nurseries."""
    below = set(_below(driver))

    def is_nursery(pid: int) -> bool:
        return b"burnish.launch.nursery" in Path(f"/proc/{pid}/cmdline").read_bytes()

    parents = {pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in below}
    return sorted(pid for pid, parent in parents.items() if parent in below and is_nursery(pid) and is_nursery(parent))


def test_a_recipe_has_the_losses_of_torchrun_however_it_is_disturbed(tiny_model, tiny_train, tmp_path):
    def recipe(name: str, **changes: Any) -> Path:
        blocks = tiny_run.recipe(tiny_model, tiny_train, tmp_path / name, num_steps=120, **changes)
        return tiny_run.write_recipe(tmp_path / f"{name}.yaml", blocks | {"checkpoint": {"save_every": 10, "keep": 2}})

    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    outside |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "burnish"]
    subprocess.run([*torchrun, "train", recipe("torchrun")], env=outside, check=True, timeout=150)

    command = [sys.executable, "-m", "burnish", "train", recipe("ray", launch={"type": "ray", "num_workers": 2})]
    run_dir, log = tmp_path / "ray", tmp_path / "ray.log"

    def start() -> subprocess.Popen[bytes]:
        with log.open("ab") as output:
            return subprocess.Popen(command, env=outside, stdout=output, stderr=subprocess.STDOUT)

    def has_come_to(step: int) -> bool:
        lines = tiny_run.read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
        return bool(lines) and lines[-1]["step"] >= step

    driver = start()
    try:
        wait_until(lambda: has_come_to(25), 120.0)
        os.kill(_ranks(driver.pid)[1], signal.SIGKILL)
        wait_until(lambda: bool(events(run_dir, "restarted")), 60.0)
        wait_until(lambda: has_come_to(50), 60.0)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(60) == 75, log.read_text()
        driver = start()
        assert driver.wait(150) == 0, log.read_text()
    finally:
        driver.kill()
    assert events(run_dir, "worker_died")[0]["reason"] == "ended by SIGKILL"
    assert events(run_dir, "restarted")[0]["seconds"] < 30.0
    assert tiny_run.losses(run_dir) == tiny_run.losses(tmp_path / "torchrun")
    assert exported(run_dir) == exported(tmp_path / "torchrun")
    assert "SYSTEM_ERROR" not in log.read_text() and "(raylet)" not in log.read_text()


def test_ranks_and_engines_stand_on_one_cluster(tiny_model, tmp_path):
    """Rank 0 holds the token for its engines' sake. Killed, it and its engine come back, and no prompt is lost."""
    rollout = {
        "group_size": 2,
        "max_policy_lag": 1,
        "engine": {"type": "fake", "tokens": [[100, 101, 2], [102, 103, 2]], "seconds_per_token": 0.02},
        "workers": {"type": "ray", "num_workers": 1},
        "alignment": {"action": "warn"},
    }
    changes = rl_helpers.changes(rl_helpers.write_prompts(tmp_path), rollout=rollout)
    blocks = tiny_run.recipe(tiny_model, tmp_path / "prompts.jsonl", tmp_path / "run")
    blocks |= changes | {"data": blocks["data"] | changes["data"], "num_steps": 30}
    blocks["launch"] = {"type": "ray", "num_workers": 2}
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path, log, run_dir = tiny_run.write_recipe(tmp_path / "run.yaml", blocks), tmp_path / "run.log", tmp_path / "run"
    with log.open("wb") as output:
        driver = subprocess.Popen(
            [sys.executable, "-m", "burnish", "train", path], env=outside, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        metrics = run_dir / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and len(tiny_run.read_metrics(run_dir)) >= 5, 180.0)
        os.kill(int((run_dir / "run.lock").read_text().split()[1]), signal.SIGKILL)
        assert driver.wait(180) == 0, log.read_text()
    finally:
        driver.kill()
    assert len(events(run_dir, "restarted")) == 1 and len(events(run_dir, "rollout_worker_started")) == 2
    assert rl_helpers.trained(run_dir) == dict.fromkeys(range(120), 1)


def exported(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run_dir / "model").glob("*.safetensors"))}
