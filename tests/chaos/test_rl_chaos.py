"""Rollout workers, reward workers and the policy die at random, and every prompt is trained once."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests import rl_helpers, tiny_run
from tests.e2e_helpers import Lab, column, events
from tests.zygote import Trial

LAUNCH = {"type": "processes", "num_workers": 1, "max_restarts": 30}
SCRIPT = [[100, 101, 2], [102, 103, 104, 105, 106, 2], [107, 2]]


def recipe(lab: Lab, **changes: Any) -> dict[str, Any]:
    """Asynchronous, one update ahead, with an engine that needs no torch in its process."""
    rollout = {
        "group_size": 2,
        "sampling": {"max_new_tokens": 8},
        "max_policy_lag": 1,
        "engine": {"type": "fake", "tokens": SCRIPT, "seconds_per_token": 0.005},
        "workers": {"type": "processes", "num_workers": 2, "heartbeat_seconds": 5.0},
        "alignment": {"action": "warn"},
    }
    blocks = rl_helpers.changes(lab.folder / "prompts.jsonl", rollout=rollout)
    return blocks | {"launch": LAUNCH, "checkpoint": {"save_every": 2, "keep": 2}} | changes


def pids(run_dir: Path) -> dict[str, int]:
    """Who can be killed now: by role, the process that was started last."""
    found = {}
    path = run_dir / "events.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        event = json.loads(line)
        if event["event"] in ("rollout_worker_started", "reward_worker_started"):
            found[f"{event['event'].split('_')[0]} {event.get('index', 0)}"] = event["pid"]
    lock = run_dir / "run.lock"
    words = lock.read_text().split() if lock.exists() else []
    return found | ({"policy": int(words[1])} if words else {})


def disturb(trial: Trial, run_dir: Path, num_kills: int, seed: int, pause: tuple[float, float]) -> list[str]:
    """Kills one process after another, so many seconds after the run has made a step since the last; whom it killed."""
    rng, killed = random.Random(seed), []
    struck: set[int] = set()
    metrics, seen = run_dir / "metrics.jsonl", b""
    deadline = time.monotonic() + 900.0
    while len(killed) < num_kills and _is_alive(trial.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
        last = metrics.read_bytes().rpartition(b"\n")[0].rpartition(b"\n")[2] if metrics.exists() else b""
        if last == seen:
            continue
        time.sleep(rng.uniform(*pause))
        roles = {role: pid for role, pid in pids(run_dir).items() if pid not in struck and _is_alive(pid)}
        if not roles:
            continue
        role = rng.choice(sorted(roles))
        struck.add(roles[role])
        os.kill(roles[role], signal.SIGKILL)
        killed.append(role)
        seen = last
    return killed


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_five_kills_lose_no_prompt_and_train_none_twice(lab: Lab):
    path = lab.recipe("killed", **recipe(lab, num_steps=16))
    trial = lab.zygote.start(["train", str(path)], lab.folder / "killed.log")
    killed = disturb(trial, lab.folder / "killed", 5, seed=3, pause=(0.0, 0.4))
    assert trial.wait() == 0, trial.output()
    run_dir = lab.folder / "killed"
    assert len(killed) == 5, (killed, trial.output())
    assert rl_helpers.trained(run_dir) == dict.fromkeys(range(64), 1), killed
    assert len(tiny_run.read_metrics(run_dir)) == 16
    assert max(column(run_dir, "lag_max")) <= 1


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_fifty_kills_and_the_reward_still_rises(lab: Lab):
    rollout = {
        "group_size": 8,
        "sampling": {"max_new_tokens": 8},
        "max_policy_lag": 1,
        "workers": {"type": "processes", "num_workers": 2, "max_restarts": 60},
    }
    blocks = rl_helpers.changes(lab.folder / "prompts.jsonl", rollout=rollout) | {
        "launch": LAUNCH | {"max_restarts": 60},
        "num_steps": 60,
        "optimizer": {"type": "adamw", "learning_rate": 1e-2},
        "schedule": {"type": "constant"},
    }
    path, run_dir = lab.recipe("fifty", **blocks), lab.folder / "fifty"
    trial = lab.zygote.start(["train", str(path)], lab.folder / "fifty.log")
    killed = disturb(trial, run_dir, 50, seed=5, pause=(0.0, 0.2))
    assert trial.wait() == 0, trial.output()
    assert len(killed) == 50, killed
    assert rl_helpers.trained(run_dir) == dict.fromkeys(range(240), 1), killed
    rewards = column(run_dir, "reward")
    assert sum(rewards[-10:]) / 10 > sum(rewards[:10]) / 10 + 0.2, rewards
    assert events(run_dir, "rollout_worker_died") and events(run_dir, "resumed")
