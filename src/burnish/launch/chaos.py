"""Running a recipe again and again while things go wrong, and comparing each run with an undisturbed one.

A trial is a supervised run on this machine whose ranks are killed, stopped or robbed of their disk and checkpoints
(`sabotage.py`). It passes when it ends by itself with the undisturbed run's losses and exported weights, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish.errors import BurnishError, Stopped
from burnish.launch.metrics_file import read_metrics, write_atomically
from burnish.launch.sabotage import Injected, Saboteur, plan, starts
from burnish.launch.supervised import FolderReport, newest_checkpoint, train

if TYPE_CHECKING:
    from burnish.launch.attempt import Limits
    from burnish.launch.processes import LocalProcesses, ProcessGroup
    from burnish.launch.worker_group import Beat, Ended, Stack
    from burnish.recipe import Recipe

VERSIONS = ("burnish", "torch", "transformers", "safetensors")
"""Packages that a certificate speaks of."""

LOOK_SECONDS = 0.005
"""Between two looks of the saboteur: a step of a tiny model takes 20 ms."""


@dataclass(slots=True)
class Trial:
    """What became of one."""

    number: int
    faults: list[str]
    """What was done: `step 7: SIGKILL to rank 1`."""
    kinds: list[str]
    """Of these faults, `kill` and so on."""
    ended: bool
    """By itself, with nobody's help."""
    same_losses: bool
    same_weights: bool
    lost_steps: list[int]
    """For each fault: steps that were done before it and had to be done again."""
    detect_seconds: list[float]
    recover_seconds: list[float]
    problem: str = ""

    @property
    def passed(self) -> bool:
        return self.ended and self.same_losses and self.same_weights


@dataclass(slots=True)
class Verdict:
    """What all trials say together."""

    trials: list[Trial] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """JSON: counts, and the largest of each time."""
        trials = self.trials
        lost = [steps for trial in trials for steps in trial.lost_steps]
        return {
            "trials": len(trials),
            "faults": dict(Counter(kind for trial in trials for kind in trial.kinds)),
            "recovered": sum(trial.ended for trial in trials),
            "bit_equal": sum(trial.same_losses and trial.same_weights for trial in trials),
            "passed": sum(trial.passed for trial in trials),
            "lost_steps_max": max(lost, default=0),
            "lost_steps_mean": round(sum(lost) / len(lost), 2) if lost else 0.0,
            "detect_seconds_max": max((s for trial in trials for s in trial.detect_seconds), default=None),
            "recover_seconds_max": max((s for trial in trials for s in trial.recover_seconds), default=None),
        }


class Arena:
    """Where trials of one recipe take place, beside its undisturbed run, which making one begins with.

    Args:
        folder: one run folder a trial, of which those that passed are removed.
        ranks: of every run.
    """

    def __init__(self, recipe: Recipe, folder: Path, ranks: int, limits: Limits, backend: LocalProcesses) -> None:
        self.recipe, self.folder, self.ranks, self.limits, self._backend = recipe, folder, ranks, limits, backend
        assert isinstance(recipe.checkpoint.save_every, int), "an interval in steps"
        self.interval = recipe.checkpoint.save_every
        self.reference = folder / "undisturbed"
        self._run(self.reference, Saboteur([], self.reference, 1, 0), [])
        self.losses, self.weights = losses(self.reference), weights(self.reference)
        self.steps = self.losses[-1][0]

    def trial(self, number: int, kinds: Sequence[str], seed: int, count: int = 2) -> Trial:
        """One run with `count` faults."""
        faults = plan(
            kinds, number, steps=self.steps, save_every=self.interval, ranks=self.ranks, seed=seed, count=count
        )
        run_dir = self.folder / f"trial-{number}"
        saboteur = Saboteur(faults, run_dir, self.interval, seed)
        times: list[tuple[str, float, dict[str, Any]]] = []
        problem = ""
        try:
            self._run(run_dir, saboteur, times)
        except BurnishError as error:
            problem = str(error)
        trial = Trial(
            number=number,
            kinds=[each.fault.kind for each in saboteur.injected],
            faults=[f"step {each.finished + 1}: {each.what}" for each in saboteur.injected],
            ended=not problem,
            same_losses=not problem and losses(run_dir) == self.losses,
            same_weights=not problem and weights(run_dir) == self.weights,
            lost_steps=_lost(saboteur.injected, run_dir),
            detect_seconds=_detected(saboteur.injected, times),
            recover_seconds=[facts["seconds"] for kind, _, facts in times if kind == "restarted"],
            problem=problem,
        )
        if trial.passed:
            shutil.rmtree(run_dir)
        return trial

    def _run(self, run_dir: Path, saboteur: Saboteur, times: list[tuple[str, float, dict[str, Any]]]) -> None:
        """Runs the recipe to its end in `run_dir`; what stopped it on purpose is followed by the same command."""
        from burnish.launch.supervise import Supervisor

        recipe = self.recipe.model_copy(update={"run_dir": str(run_dir)})
        self._backend.assign(partial(train, recipe, False))
        report = _Timed(run_dir, times)
        while True:
            supervisor = Supervisor(
                _Sabotaged(self._backend, saboteur),
                [self.ranks],
                self.ranks,
                self.limits,
                report,
                progress=lambda: newest_checkpoint(run_dir),
                stop_requested=lambda: saboteur.stop_requested,
            )
            try:
                supervisor.run()
                return
            except Stopped:
                saboteur.stop_requested = None


def losses(run_dir: Path) -> list[tuple[int, str, str]]:
    """(step, loss, gradient norm) of every step, to the last bit; NaN is equal to NaN."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [(line["step"], line["loss"].hex(), line["grad_norm"].hex()) for line in lines if "grad_norm" in line]


def weights(run_dir: Path) -> dict[str, str]:
    """SHA-256 of every exported weight file."""
    files = sorted((run_dir / "model").glob("*.safetensors"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_certificate(arena: Arena, verdict: Verdict, seed: int) -> Path | None:
    """Writes what the trials have verified beside the undisturbed run's last checkpoint; None if one did not pass, or
    nothing was done to any.

    Whoever finds the checkpoint can see that runs of this recipe, by these versions, came back bit for bit.
    """
    if not all(trial.passed for trial in verdict.trials) or not any(trial.kinds for trial in verdict.trials):
        return None
    step = newest_checkpoint(arena.reference)
    manifest = (arena.reference / f"checkpoint-{step}" / "manifest.json").read_bytes()
    resolved = arena.recipe.resolved() | {"run_dir": None, "launch": None}
    certificate = {
        "checkpoint": f"checkpoint-{step}",
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
        "recipe_sha256": hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest(),
        "ranks": arena.ranks,
        "seed": seed,
        "verified": "every trial ended by itself with the losses and weights of the undisturbed run, bit for bit",
        "verdict": verdict.summary(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}},
        "trials": [asdict(trial) for trial in verdict.trials],
    }
    path = arena.reference / f"checkpoint-{step}.certificate.json"
    write_atomically(path, json.dumps(certificate, indent=1).encode() + b"\n")
    return path


def _lost(injected: Sequence[Injected], run_dir: Path) -> list[int]:
    """Steps done again after each fault; none where the run was over and no start followed."""
    begun = starts(run_dir)
    return [max(each.finished - begun[each.starts], 0) if each.starts < len(begun) else 0 for each in injected]


def _detected(injected: Sequence[Injected], times: Sequence[tuple[str, float, dict[str, Any]]]) -> list[float]:
    """Seconds from each fault that harms to the first that supervision says of a dead or hung rank after it."""
    seen = [at for kind, at, _ in times if kind in ("worker_died", "worker_hung")]
    firsts = (next((at for at in seen if at > each.at), None) for each in injected if each.fault.kind != "term")
    harmed = (each.at for each in injected if each.fault.kind != "term")
    return [round(later - earlier, 3) for earlier, later in zip(harmed, firsts, strict=True) if later is not None]


class _Timed(FolderReport):
    """Notes when supervision saw what, by the saboteur's clock."""

    def __init__(self, run_dir: Path, times: list[tuple[str, float, dict[str, Any]]]) -> None:
        super().__init__(run_dir, json_lines=False)
        self._times = times

    def event(self, kind: str, **facts: Any) -> None:
        self._times.append((kind, time.monotonic(), facts))
        super().event(kind, **facts)

    def note(self, text: str) -> None:
        """The same stands in the events."""


class _Sabotaged:
    """A backend whose groups the saboteur sees."""

    def __init__(self, backend: LocalProcesses, saboteur: Saboteur) -> None:
        self._backend, self._saboteur = backend, saboteur

    def start(self, size: int, attempt: int) -> _SabotagedGroup:
        return _SabotagedGroup(self._backend.start(size, attempt), self._saboteur)

    def available(self) -> int:
        return self._backend.available()

    def close(self) -> None:
        pass


class _SabotagedGroup:
    def __init__(self, group: ProcessGroup, saboteur: Saboteur) -> None:
        self._group, self._saboteur, self.size = group, saboteur, group.size

    def wait(self, seconds: float) -> list[Ended]:
        until = time.monotonic() + seconds
        while True:
            self._saboteur.look(self._group.pids, [beat.phase for beat in self._group.beats()])
            ended = self._group.wait(LOOK_SECONDS)
            if ended or time.monotonic() >= until or self._saboteur.stop_requested is not None:
                return ended

    def beats(self) -> list[Beat]:
        return self._group.beats()

    def stop(self) -> None:
        self._group.stop()

    def stacks(self, ranks: Sequence[int]) -> dict[int, Stack]:
        return self._group.stacks(ranks)

    def kill(self) -> None:
        self._group.kill()


@contextmanager
def open_backend(ranks: int, log: Path) -> Iterator[LocalProcesses]:
    """Where all runs of a series start: ranks forked from one process, what they print in `log`."""
    from burnish.launch.processes import MODULES, LocalProcesses

    with open(log, "ab") as file:
        outputs = (file.fileno(), file.fileno())
        backend = LocalProcesses(_nothing, ranks, modules=(*MODULES, "peft"), outputs=outputs)
        try:
            yield backend
        finally:
            backend.close()


def _nothing(_beat: Callable[[str], None]) -> int:
    return 0
