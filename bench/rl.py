"""Reinforcement learning with sampling beside training, and with the two taking turns: `python -m bench rl`.

`burnish train` on two cores: the trainer on core 0, the rollout worker and the reward process on core 1, in both modes;
only `max_policy_lag` differs. Times: a Llama of hidden size 96 trains, and a scripted engine takes its time asleep, for
64 rollouts a step of log-normal lengths (median 48 tokens, one in 25 is cut off at 256). A first run finds how long a
token must take for sampling to take as long as training; then the modes take turns. What rollouts and training take
alone is read from the synchronous runs: `data_wait_seconds`, and the rest of the time from one line of `metrics.jsonl`
to the next. Rewards: the embedded engine, a fresh model that learns to answer in digits, the same seeds in both modes.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.report import report

ROUNDS, SEEDS = 3, 3
TIMED_STEPS, WARM_STEPS = 8, 3
"""The first steps import lazily, and fill the line of what is sampled ahead."""
REWARD_STEPS, LAST = 35, 5
FIRST_GUESS = 0.002
"""Seconds a token, in the run that finds the right one."""
TRAINER, ROLLOUT = {0}, {1}
"""The cores of the two roles."""
RUN_SECONDS = 240.0
"""A run that takes longer is stuck."""


class Timing(NamedTuple):
    """Means over the timed steps of a run, in seconds."""

    step: float
    wait: float
    sync: float
    cpu: float
    """Of the trainer's process: what a step would take less its wait, if nothing else ran on its core."""


def recipe(folder: Path, name: str, rollout: dict[str, Any], hidden: int, **changes: Any) -> Path:
    """GRPO on 8 prompts a step, 8 rollouts of each, and what the two parts have in common."""
    workers = {"type": "processes", "num_workers": 1, "num_threads": 1}
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i} + {i % 7} ="}) + "\n" for i in range(400)))
    blocks = {
        "workflow": {
            "type": "rl",
            "preset": "grpo",
            "rollout": {"group_size": 8, "workers": workers} | rollout,
            "rewards": [{"type": "regex", "name": "digits", "pattern": "[0-9]", "match": "share"}],
        },
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": hidden,
                "intermediate_size": 2 * hidden,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
            }
        },
        "data": {
            "train": [{"type": "jsonl", "path": str(prompts)}],
            "tokenizer": {"type": "bytes"},
            "max_length": 320,
            "packing": {"type": "best_fit", "row_length": 1024},
        },
        "optimizer": {"type": "adamw", "learning_rate": 6e-3, "weight_decay": 0.0},
        "global_batch_size": 8,
        "checkpoint": {"save_every": 1000},
        "run_dir": str(folder / name),
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(blocks | changes))
    return path


def begin(path: Path) -> subprocess.Popen[bytes]:
    """A run on one thread, which prints into a file beside its recipe."""
    with path.with_suffix(".log").open("wb") as log:
        command = [sys.executable, "-m", "burnish", "train", str(path)]
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def end(run: subprocess.Popen[bytes], path: Path) -> list[dict[str, Any]]:
    """The metrics of its steps."""
    code = run.wait(RUN_SECONDS)
    assert code == 0, path.with_suffix(".log").read_text()
    return [json.loads(line) for line in (path.with_suffix("") / "metrics.jsonl").read_text().splitlines()]


def pin(trainer: int) -> None:
    """The trainer to its core, what it has started to the other one."""
    for thread in os.listdir(f"/proc/{trainer}/task"):
        os.sched_setaffinity(int(thread), TRAINER)
        for child in Path(f"/proc/{trainer}/task/{thread}/children").read_text().split():
            os.sched_setaffinity(int(child), ROLLOUT)


def cpu_seconds(process: int) -> float:
    """Of all its threads so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def timed(folder: Path, name: str, lag: int, seconds_per_token: float) -> Timing:
    """A run whose every line of metrics is seen as it is written."""
    draw = random.Random(0).randint
    engine = {
        "type": "fake",
        "tokens": [[draw(50, 120) for _ in range(40)] for _ in range(32)],
        "length": {"median": 48, "sigma": 1.0},
        "seconds_per_token": seconds_per_token,
    }
    rollout = {
        "engine": engine,
        "workers": {"type": "processes", "num_workers": 1, "num_threads": 1, "cpus": sorted(ROLLOUT)},
        "sampling": {"max_new_tokens": 256},
        "max_policy_lag": lag,
        "alignment": {"every": 1000, "action": "warn"},  # a script knows no log-probabilities
    }
    path = recipe(folder, name, rollout, 96, num_steps=WARM_STEPS + TIMED_STEPS)
    run, metrics, seen = begin(path), folder / name / "metrics.jsonl", []
    while len(seen) < WARM_STEPS + TIMED_STEPS and run.poll() is None:
        count = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if count > len(seen):
            if not seen:
                pin(run.pid)
            seen += [(time.perf_counter(), cpu_seconds(run.pid))] * (count - len(seen))
        time.sleep(0.01)
    lines = end(run, path)[WARM_STEPS:]
    (began, cpu_before), (ended, cpu_after) = seen[WARM_STEPS - 1], seen[-1]
    return Timing(
        (ended - began) / TIMED_STEPS,
        statistics.fmean(line["data_wait_seconds"] for line in lines),
        statistics.fmean(line["sync_seconds"] for line in lines),
        (cpu_after - cpu_before) / TIMED_STEPS,
    )


def curves(folder: Path, seed: int) -> tuple[list[float], list[float]]:
    """Mean reward of each step, in turns and beside; the two runs share the machine."""
    paths = []
    for lag in (0, 1):
        rollout = {"sampling": {"max_new_tokens": 12}, "max_policy_lag": lag}
        paths.append(recipe(folder, f"reward-{seed}-{lag}", rollout, 64, num_steps=REWARD_STEPS, seed=seed))
    runs = [begin(path) for path in paths]
    turns, beside = ([line["reward"] for line in end(run, path)] for run, path in zip(runs, paths, strict=True))
    return turns, beside


def steps_behind(turns: Sequence[float], beside: Sequence[float]) -> float:
    """How many steps later the second curve rises, where both begin and end alike: the area between them over the
    height that they rise."""
    return (sum(turns) - sum(beside)) / (turns[-1] - turns[0])


def row(what: str, values: list[float], asked: str = "") -> dict[str, Any]:
    """A line of the report, over rounds or seeds."""
    middle, least, most = statistics.median(values), min(values), max(values)
    return {"what": what, "median": middle, "least": least, "most": most, "asked": asked}


def times(folder: Path) -> list[dict[str, Any]]:
    guess = timed(folder, "calibration", 0, FIRST_GUESS)
    per_token = FIRST_GUESS * (guess.step - guess.wait) / guess.wait
    turns, beside = [], []
    for i in range(ROUNDS):
        turns.append(timed(folder, f"turns-{i}", 0, per_token))
        beside.append(timed(folder, f"beside-{i}", 1, per_token))
    pairs = list(zip(turns, beside, strict=True))
    return [
        row("rollouts alone, seconds a step", [each.wait for each in turns]),
        row("training and sync alone", [each.step - each.wait for each in turns]),
        row("CPU seconds of the trainer over that: 1, if its core is idle", [t.cpu / (t.step - t.wait) for t in turns]),
        row("a step, taking turns", [each.step for each in turns]),
        row("a step, sampling beside training", [each.step for each in beside]),
        row("of it waiting for rollouts", [each.wait for each in beside]),
        row("of it bringing weights to the engine", [each.sync for each in beside]),
        row("over the longer of the two alone", [b.step / max(t.wait, t.step - t.wait) for t, b in pairs], "<= 1.15"),
        row("turns over beside", [t.step / b.step for t, b in pairs], ">= 1.3"),
    ]


def rewards(folder: Path) -> list[dict[str, Any]]:
    pairs = [curves(folder, seed) for seed in range(SEEDS)]
    turns, beside = ([statistics.fmean(pair[mode][-LAST:]) for pair in pairs] for mode in (0, 1))
    error = ((statistics.variance(turns) + statistics.variance(beside)) / SEEDS) ** 0.5
    difference = statistics.fmean(beside) - statistics.fmean(turns)
    return [
        row(f"reward after {REWARD_STEPS} steps, taking turns", turns),
        row("the same, sampling beside training", beside),
        row("difference of their means, in standard errors", [difference / error], "-2.8 to 2.8"),
        row(
            "steps that sampling beside training rises later", [steps_behind(*pair) for pair in pairs], "<= 1, its lag"
        ),
    ]


def main() -> None:
    assert os.sched_getaffinity(0) >= TRAINER | ROLLOUT, "needs cores 0 and 1, one for each role"
    with tempfile.TemporaryDirectory() as name:
        report("rl", times(Path(name)) + rewards(Path(name)))


if __name__ == "__main__":
    main()
