"""Engines in processes of their own: real processes that are killed, stopped and made to fail."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import RestartsExhausted, RunFailed, SyncFailed, UserError
from burnish.rollout.fleet import Fleet, Parts
from burnish.rollout.host_process import ProcessLink
from burnish.rollout.workers.inline import Inline
from burnish.rollout.workers.processes import Processes
from burnish.rollouts import Request
from tests.rollout_worker_helpers import (
    SETUP,
    TENSORS,
    Borrowed,
    ByFile,
    Events,
    Scripted,
    assert_complete,
    collect,
    digest_of,
    opened,
    requests,
    tensors,
)

ROOT = Path(__file__).parents[2]


@contextmanager
def fleet_of(folder: Path, engine: dict[str, Any] | None = None, **fields: Any) -> Iterator[tuple[Fleet, Events]]:
    """Workers that are gone at the end."""
    fleet, events = opened(Processes.model_validate({"num_threads": 1, **fields}), folder, **(engine or {}))
    try:
        yield fleet, events
    finally:
        fleet.close()
    for event in events.of("started"):
        assert not runs(event["pid"])


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.005)


def test_every_request_is_finished_once_whoever_is_killed_meanwhile(tmp_path):
    asked, draw = requests(range(50)), random.Random(7)
    with fleet_of(tmp_path, {"step_seconds": 0.01}, num_workers=2, max_restarts=50) as (fleet, events):
        fleet.publish(3, tensors, None)
        fleet.submit(asked)
        found, killed, next_kill = [], 0, 5
        until = time.monotonic() + 60.0
        while len(found) < 200 and time.monotonic() < until:
            found += fleet.poll(0.05)
            if len(found) >= next_kill and (pids := events.pids()):
                os.kill(draw.choice(pids), signal.SIGKILL)
                killed, next_kill = killed + 1, len(found) + draw.randint(4, 40)
        found += fleet.poll(0.3)  # a second completion of a request would come now
        facts = fleet.facts()
    assert_complete(found, asked, version=3)
    died = events.of("died")
    assert len(died) == facts["restarts"] == killed >= 6 and facts["resubmitted"] >= 6
    assert all("ended by SIGKILL" in event["reason"] and event["pid"] for event in died)
    assert 1 <= len(events.of("refitted")) <= len(events.of("started")) - 2
    assert not list(tmp_path.glob("weights-*"))


def test_a_group_goes_to_one_worker_and_later_turns_follow_it(tmp_path):
    with fleet_of(tmp_path, num_workers=2) as (fleet, events):
        assert (fleet.num_workers, fleet.capacity) == (2, 8)
        early = requests([9])
        fleet.submit(early)
        assert fleet.poll(0.3) == []  # no weights were published
        receipts = fleet.publish(0, tensors, None)
        assert [(r.version, r.digest, r.worker) for r in receipts] == [
            (0, digest_of(TENSORS), "rollout 0"),
            (0, digest_of(TENSORS), "rollout 1"),
        ]
        assert_complete(collect(fleet, 4), early, version=0)
        asked = requests(range(6))
        fleet.submit(asked)
        found = collect(fleet, 24)
        assert_complete(found, asked, version=0)
        homes: dict[str, set[int]] = {}
        for completion in found:
            homes.setdefault(completion.request_id.partition(".")[0], set()).add(completion.token_ids[0])
        assert [len(pids) for pids in homes.values()] == [1] * 6
        assert {pid for pids in homes.values() for pid in pids} == set(events.pids())
        assert fleet.facts()["sampled_tokens"] == 28 * 5

        second = [Request(f"{prompt}.0.1", [1], prompt, asked[0].params) for prompt in range(6)]
        fleet.submit(second)
        for completion in collect(fleet, 6):
            assert homes[completion.request_id.partition(".")[0]] == {completion.token_ids[0]}


def test_what_goes_first_reaches_every_worker_each_time(tmp_path):
    with fleet_of(tmp_path, {"step_seconds": 0.005}, num_workers=2) as (fleet, events):
        fleet.publish(0, tensors, None)
        for _ in range(2):
            fleet.submit(requests([5], length=8))  # one worker has its hands full
            for place in range(2):
                fleet.submit([Request(f"probe-{place}.0.0", [1], 7, requests([0])[0].params)], first=True)
            found = collect(fleet, 6)
            asked = {each.request_id: each.token_ids[0] for each in found if each.request_id.startswith("probe")}
            assert len(asked) == 2 and set(asked.values()) == set(events.pids())


def test_aborted_requests_are_not_heard_of_and_their_names_are_free_again(tmp_path):
    with fleet_of(tmp_path, {"step_seconds": 0.02}) as (fleet, _):
        fleet.publish(1, tensors, None)
        fleet.submit(requests([1, 2], length=8))
        fleet.poll(0.1)  # on their way
        fleet.abort()
        again = requests([1, 2], length=3)
        fleet.submit(again)
        found = collect(fleet, 8) + fleet.poll(0.2)
        assert_complete(found, again, version=1)


def test_weights_reach_what_is_in_flight_and_newer_ones_replace_them(tmp_path):
    with fleet_of(tmp_path, {"step_seconds": 0.02}) as (fleet, events):
        fleet.publish(1, tensors, None)
        fleet.submit(requests([0], group_size=1, length=10))
        wait_until(lambda: fleet.poll(0.01) == [] and list(tmp_path.glob("at-step-*")))
        fleet.publish(2, tensors, None)
        (completion,) = collect(fleet, 1)
        assert completion.versions == sorted(completion.versions) and {1, 2} == set(completion.versions)
        assert [path.name for path in tmp_path.glob("weights-*")] == ["weights-2.json"]
        assert events.of("refitted") == []


@pytest.mark.parametrize("how", ["stopped", "stuck"])
def test_a_hung_worker_is_killed_and_its_requests_go_elsewhere(how, tmp_path):
    if how == "stuck":
        (tmp_path / "fault-step").write_text("hang")
    with fleet_of(tmp_path, {"step_seconds": 0.05}, num_workers=2, heartbeat_seconds=0.8) as (fleet, events):
        fleet.publish(5, tensors, None)
        asked = requests(range(8))
        fleet.submit(asked)
        if how == "stopped":
            first = events.pids()[0]
            wait_until((tmp_path / f"at-step-{first}").exists)  # the other one may sample before it
            os.kill(first, signal.SIGSTOP)
        struck = time.monotonic()
        found = collect(fleet, 32)
        wait_until(lambda: fleet.poll(0.01) or events.of("refitted"))
        seconds = time.monotonic() - struck
    assert_complete(found, asked, version=5)
    (hung,) = events.of("hung")
    assert "no sign of life for 0.8 s, in the phase `step`" in hung["reason"]
    assert ("hang_here" in hung["words"]) == (how == "stuck")  # where it stands; a stopped one cannot say
    assert seconds < 0.8 + 0.5 + 3.0  # 0.5 s: it is asked where it stands


def test_a_worker_that_never_starts_ends_the_run_with_its_words(tmp_path):
    (tmp_path / "fault-open").write_text("bug!")
    with fleet_of(tmp_path, max_restarts=1) as (fleet, events), pytest.raises(RestartsExhausted) as given_up:
        fleet.publish(0, tensors, None)
    assert len(given_up.value.failures) == 2
    assert "exit code 1: KeyError: 'no such layer'" in given_up.value.failures[0]
    assert "_suffer" in given_up.value.words and "without a completed request" in str(given_up.value)
    assert len(events.of("died")) == 2 and events.of("started") == []


def test_a_worker_that_cannot_be_opened_again_ends_no_run_in_which_another_works(tmp_path):
    """Its node is gone: every start fails, more often than the run would bear of a worker that opens."""
    with fleet_of(tmp_path, num_workers=2, max_restarts=1) as (fleet, events):
        fleet.publish(0, tensors, None)
        (tmp_path / "fault-open").write_text("bug!")
        os.kill(events.pids()[0], signal.SIGKILL)
        asked, found = requests(range(40), group_size=1), []
        fleet.submit(asked)
        while len(events.of("died")) < 2:
            found += fleet.poll(0.05)
            again = requests([1000 + len(asked)], group_size=1)
            asked += again
            fleet.submit(again)
        (tmp_path / "fault-open").unlink()
        found += collect(fleet, len(asked) - len(found))
        assert_complete(found, asked, version=0)


def test_a_worker_that_says_nothing_while_it_loads_is_given_up(tmp_path):
    (tmp_path / "fault-open").write_text("hang!")
    with fleet_of(tmp_path, max_restarts=0, start_seconds=1.5) as (fleet, _), pytest.raises(RestartsExhausted) as hung:
        fleet.publish(0, tensors, None)
    assert "no sign of life for 1.5 s, in the phase `load`" in hung.value.failures[0]
    assert "hang_here" in hung.value.words


@pytest.mark.parametrize(
    ("fault", "at", "error", "words"),
    [
        ("user", "open", UserError, "model.path: no such model\n  cure: name one"),
        ("memory", "step", RunFailed, "rollout worker 0 .* cannot go on: out of memory with one request"),
    ],
)
def test_what_would_happen_again_is_raised_and_not_tried_again(fault, at, error, words, tmp_path):
    (tmp_path / f"fault-{at}").write_text(fault)
    with fleet_of(tmp_path) as (fleet, events), pytest.raises(error, match=words):
        fleet.publish(0, tensors, None)
        fleet.submit(requests([0]))
        collect(fleet, 4, seconds=5.0)
    assert events.of("died") == []


def test_a_request_that_ends_every_worker_ends_the_run_with_its_name(tmp_path):
    (tmp_path / "fault-step-1.0.0").write_text("exit!")
    with fleet_of(tmp_path, {"slots": 1}, num_workers=2, max_restarts=2) as (fleet, _):
        fleet.publish(0, tensors, None)
        fleet.submit(requests(range(12), group_size=1))
        with pytest.raises(RestartsExhausted, match=r"request 1\.0\.0 was in flight at 3 ends of workers") as given_up:
            collect(fleet, 12, seconds=20.0)
    assert "exit code 3" in str(given_up.value)


def test_all_workers_may_die_while_weights_are_published(tmp_path):
    with fleet_of(tmp_path, num_workers=2) as (fleet, events):
        fleet.publish(1, tensors, None)
        first = events.pids()
        asked = requests(range(4))
        fleet.submit(asked)
        (tmp_path / "fault-update").write_text("slow!")

        def strike() -> None:
            wait_until(lambda: all((tmp_path / f"at-update-{pid}").exists() for pid in first))
            for pid in first:
                os.kill(pid, signal.SIGKILL)
            (tmp_path / "fault-update").unlink()

        for pid in first:
            (tmp_path / f"at-update-{pid}").unlink()  # of the first version
        striker = threading.Thread(target=strike)
        striker.start()
        receipts = fleet.publish(2, tensors, None)
        striker.join()
        assert receipts and all((r.version, r.digest) == (2, digest_of(TENSORS)) for r in receipts)
        assert_complete(collect(fleet, 16), asked, version=2)
    assert {event["pid"] for event in events.of("died")} == set(first)
    assert [event["version"] for event in events.of("refitted")][:1] == [2]


def test_a_restarted_worker_samples_nothing_before_it_holds_the_weights(tmp_path):
    with fleet_of(tmp_path) as (fleet, events):
        fleet.publish(4, tensors, None)
        (tmp_path / "fault-update").write_text("slow")
        (pid,) = events.pids()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: fleet.poll(0.01) == [] and events.of("died"))
        asked = requests([0])
        fleet.submit(asked)
        wait_until(lambda: fleet.poll(0.01) == [] and len(events.of("started")) == 2)
        (new,) = events.pids()
        fleet.poll(0.2)
        assert not (tmp_path / f"at-step-{new}").exists()  # 0.2 of the 0.4 s that its weights take
        assert_complete(collect(fleet, 4), asked, version=4)
    (refitted,) = events.of("refitted")
    assert (refitted["pid"], refitted["version"]) == (new, 4) and refitted["seconds"] >= 0.4


def test_a_worker_without_the_published_weights_is_named(tmp_path):
    with fleet_of(tmp_path, heartbeat_seconds=60.0, sync_seconds=0.5) as (fleet, _):
        fleet.publish(1, tensors, None)
        (tmp_path / "lie").touch()
        with pytest.raises(SyncFailed, match=r"rollout worker 0 .* holds version 2 with digest wrong"):
            fleet.publish(2, tensors, None)
        (tmp_path / "fault-update").write_text("hang")
        with pytest.raises(SyncFailed, match=r"rollout worker 0 .* version 3 after 0.5 s, in the phase `update`"):
            fleet.publish(3, tensors, None)


def test_a_worker_that_hangs_as_it_takes_weights_is_started_anew_and_takes_them(tmp_path):
    with fleet_of(tmp_path, heartbeat_seconds=0.6) as (fleet, events):
        fleet.publish(1, tensors, None)
        (tmp_path / "fault-update").write_text("hang")
        (receipt,) = fleet.publish(2, tensors, None)
        assert (receipt.version, receipt.digest) == (2, digest_of(TENSORS))
    (hung,) = events.of("hung")
    assert "in the phase `update`" in hung["reason"] and "hang_here" in hung["words"]


def test_weights_that_are_not_there_for_a_restarted_worker_are_no_weights(tmp_path):
    with fleet_of(tmp_path) as (fleet, events):
        fleet.publish(6, tensors, None)
        (tmp_path / "weights-6.json").unlink()
        os.kill(events.pids()[0], signal.SIGKILL)
        with pytest.raises(SyncFailed, match=r"rollout worker 0 .* version 6: weights-6.json is not there"):
            collect(fleet, 1, seconds=10.0)


def test_workers_sleep_and_wake_and_close_their_engines(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("RANK", "0")  # as in a trainer of several ranks, to which no engine belongs
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)  # of tests with a cluster, in the same process
    core = min(os.sched_getaffinity(0))
    with fleet_of(tmp_path, cpus=[core], num_threads=3) as (fleet, events):
        fleet.publish(0, tensors, None)
        (pid,) = events.pids()
        fleet.sleep()
        assert (tmp_path / f"at-sleep-{pid}").exists()
        fleet.wake()
        asked = requests([0])
        fleet.submit(asked)
        assert_complete(collect(fleet, 4), asked, version=0)
    assert (tmp_path / f"closed-{pid}").exists()
    assert f"[rollout 0] opened with 3 threads on [{core}]\n[rollout 0] knows []\n" in capfd.readouterr().err


def test_cores_and_gpus_that_cannot_be_given_are_refused(tmp_path):
    with pytest.raises(UserError, match="this process may not run on core 4096"):
        opened(Processes(cpus=[4096]), tmp_path)
    with pytest.raises(ValueError, match="3 GPUs cannot be dealt out to 2 workers evenly"):
        Processes(num_workers=2, gpus=[0, 1, 2])


PARENT = """
import sys
from pathlib import Path
from burnish.rollout.workers.processes import Processes
from tests.rollout_worker_helpers import opened, tensors
fleet, events = opened(Processes(num_workers=2, num_threads=1), Path(sys.argv[1]))
fleet.publish(0, tensors, None)
print(*events.pids(), flush=True)
while True:
    fleet.poll(1.0)
"""


def test_workers_end_with_the_process_that_started_them(tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}) as parent:
        assert parent.stdout
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        os.kill(pids[0], signal.SIGSTOP)  # this one cannot see that nobody speaks to it any more
        assert len(pids) == 2 and all(runs(pid) for pid in pids)
        parent.kill()
    wait_until(lambda: not any(runs(pid) for pid in pids), seconds=5.0)


def test_what_a_worker_starts_in_a_session_of_its_own_ends_with_it():
    ours, theirs = socket.socketpair()
    printed, prints = os.pipe()
    command = ["sh", "-c", "setsid sleep 1000 & echo $!; wait"]
    link = ProcessLink(subprocess.Popen(command, stdout=prints, start_new_session=True), ours, printed)
    theirs.close()
    os.close(prints)
    lines: list[str] = []
    wait_until(lambda: lines.extend(link.hear().lines) or lines)
    started = int(lines[0])
    wait_until(lambda: os.getsid(started) == started)
    link.kill()
    wait_until(lambda: not runs(started))


def test_an_engine_in_this_process_is_brought_weights_only_if_it_asks(tmp_path):
    asked_for: list[int] = []

    def counted() -> Iterator[tuple[str, Any]]:
        asked_for.append(1)
        return tensors()

    engine, sync = Scripted(folder=str(tmp_path), slots=2), ByFile(folder=str(tmp_path))
    fleet = Inline().open(Parts(engine, SETUP, sync, None, tmp_path, Events()))
    (receipt,) = fleet.publish(9, counted, None)
    assert (receipt.version, receipt.digest, len(asked_for)) == (9, digest_of(TENSORS), 1)
    asked = requests([0, 1], group_size=3)
    fleet.submit(asked)
    assert_complete(collect(fleet, 6), asked, version=9)
    started = time.monotonic()
    assert fleet.poll(0.1) == [] and time.monotonic() - started >= 0.1
    (tmp_path / "lie").touch()
    with pytest.raises(SyncFailed, match="digest wrong"):
        fleet.publish(10, counted, None)
    fleet.close()
    assert not list(tmp_path.glob("weights-*"))


def test_an_engine_that_samples_from_the_policys_own_model_is_brought_nothing(tmp_path):
    def gathered() -> Iterator[tuple[str, Any]]:
        raise AssertionError("the policy's tensors were gathered for nobody")

    engine, sync = Borrowed(folder=str(tmp_path)), ByFile(folder=str(tmp_path))
    fleet = Inline().open(Parts(engine, SETUP, sync, None, tmp_path, Events()))
    for version in (0, 1):
        (receipt,) = fleet.publish(version, gathered, None)
        assert (receipt.version, receipt.num_bytes) == (version, 0)
    asked = requests([3])
    fleet.submit(asked)
    assert_complete(collect(fleet, 4), asked, version=1)
    fleet.close()
    assert not Inline().beside and Processes().beside
