"""An engine that does what files in a folder say, and a transport of weights that needs no torch."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from burnish.errors import RunFailed, SyncFailed, UserError
from burnish.rollout.engine import Engine, EngineSetup, Receipt, Weights
from burnish.rollout.fleet import Fleet, Parts
from burnish.rollout.sync.base import WeightSync
from burnish.rollout.workers.watched import Watched
from burnish.rollouts import Completion, Request, SamplingParams

NAME = "tests.rollout_worker_helpers:"
TENSORS = [("weight", [0.5, -1.0]), ("bias", [2.0])]
SETUP: Any = {"no model": "these engines need none"}


class Events:
    """What a fleet told of."""

    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []

    def __call__(self, kind: str, **facts: Any) -> None:
        self.all.append({"event": kind, **facts})

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.all if event["event"] == f"rollout_worker_{kind}"]

    def pids(self) -> list[int]:
        """Of the workers that run, as far as it is known."""
        running = {event["index"]: event["pid"] for event in self.of("started")}
        gone = {event["pid"] for event in self.all if event["event"].endswith(("_died", "_hung"))}
        return [pid for pid in running.values() if pid not in gone]


class Scripted(Engine):
    """Draws a token a step for each of `slots` requests: the process id first, then numbers from the seed."""

    type: str = NAME + "Scripted"
    folder: str
    slots: int = 4
    step_seconds: float = 0.001

    def open(self, setup: EngineSetup, model: Any = None) -> ScriptedLive:
        assert setup == SETUP
        return ScriptedLive(self)

    @property
    def capacity(self) -> int:
        return self.slots


class ScriptedLive:
    def __init__(self, engine: Scripted) -> None:
        self.version, self._engine = -1, engine
        self._queue: list[Request] = []
        self._flight: dict[str, tuple[Request, list[int], list[float], list[int]]] = {}
        self._facts = {"sampled_tokens": 0.0}
        print(f"opened with {os.environ.get('OMP_NUM_THREADS')} threads on {sorted(os.sched_getaffinity(0))}")
        print(f"knows {sorted({'RAY_AUTH_TOKEN', 'RANK', 'MASTER_ADDR'} & os.environ.keys())}")
        self._suffer("open")

    def submit(self, requests: Sequence[Request]) -> None:
        self._queue += requests

    def step(self) -> list[Completion]:
        while self._queue and len(self._flight) < self._engine.slots:
            request = self._queue.pop(0)
            self._flight[request.request_id] = request, [], [], []
        if not self._flight:
            return []
        self._suffer("step")
        self._suffer(f"step-{next(iter(self._flight))}")
        time.sleep(self._engine.step_seconds)
        done = []
        for name, (request, tokens, logprobs, versions) in list(self._flight.items()):
            tokens.append(os.getpid() if not tokens else request.seed)
            logprobs.append(expected_logprob(request.seed, len(tokens)))
            versions.append(self.version)
            self._facts["sampled_tokens"] += 1
            if len(tokens) >= request.params.max_new_tokens:
                del self._flight[name]
                done.append(Completion(name, tokens, logprobs, versions, "length"))
        return done

    @property
    def num_unfinished(self) -> int:
        return len(self._queue) + len(self._flight)

    def abort(self) -> None:
        self._queue.clear()
        self._flight.clear()

    def update_weights(self, weights: Weights) -> Receipt:
        started = time.perf_counter()
        self.version = -1
        found = list(weights.tensors())
        self._suffer("update")
        self.version = weights.version
        digest = "wrong" if (Path(self._engine.folder) / "lie").exists() else digest_of(found)
        return Receipt(weights.version, digest, len(json.dumps(found)), time.perf_counter() - started)

    def sleep(self) -> None:
        self._suffer("sleep")

    def wake(self) -> None:
        pass

    def facts(self) -> dict[str, float]:
        return self._facts

    def close(self) -> None:
        (Path(self._engine.folder) / f"closed-{os.getpid()}").touch()

    def _suffer(self, where: str) -> None:
        """Notes that it is there, and brings about what `fault-<where>` says. A fault with a `!` happens every time,
        others once."""
        folder = Path(self._engine.folder)
        (folder / f"at-{where}-{os.getpid()}").touch()
        try:
            fault = (folder / f"fault-{where}").read_text()
            if not fault.endswith("!"):
                (folder / f"fault-{where}").unlink()
        except FileNotFoundError:
            return
        match fault.rstrip("!"):
            case "exit":
                os._exit(3)
            case "bug":
                raise KeyError("no such layer")
            case "user":
                raise UserError("no such model", where="model.path", cure="name one that is there")
            case "memory":
                raise RunFailed("out of memory with one request")
            case "hang":
                hang_here()
            case "slow":
                time.sleep(0.4)


class Borrowed(Scripted):
    """Samples from the policy's own model: a version is all that it takes note of."""

    type: str = NAME + "Borrowed"

    def open(self, setup: EngineSetup, model: Any = None) -> ScriptedLive:
        return BorrowedLive(self)


class BorrowedLive(ScriptedLive):
    def update_weights(self, weights: Weights) -> Receipt:
        self.version = weights.version
        return Receipt(weights.version, weights.digest, 0, 0.0)


def hang_here() -> None:
    time.sleep(60)


def expected_logprob(seed: int, place: int) -> float:
    return -random.Random(f"{seed}/{place}").random()


def digest_of(tensors: Sequence[tuple[str, Any]]) -> str:
    return hashlib.sha256(json.dumps([list(each) for each in tensors]).encode()).hexdigest()


class ByFile(WeightSync):
    """A JSON file for each version."""

    type: str = NAME + "ByFile"
    folder: str

    def sender(self, run_dir: Path) -> FileEnd:
        return FileEnd(Path(self.folder))

    def receiver(self) -> FileEnd:
        return FileEnd(Path(self.folder), is_sender=False)


class FileEnd:
    def __init__(self, folder: Path, *, is_sender: bool = True) -> None:
        self._folder, self._is_sender = folder, is_sender

    def send(self, version: int, tensors: Iterator[Any], *, adapter_only: bool, folder: Path | None) -> dict[str, Any]:
        found = list(tensors)
        (self._folder / f"weights-{version}.json").write_text(json.dumps(found))
        return {"version": version, "digest": digest_of(found), "adapter_only": adapter_only}

    def receive(self, parcel: dict[str, Any], alive: Any = None) -> Arrived:
        path = self._folder / f"weights-{parcel['version']}.json"
        if not path.exists():
            raise SyncFailed(f"{path.name} is not there")
        return Arrived(parcel["version"], parcel["digest"], parcel["adapter_only"], json.loads(path.read_text()))

    def forget(self, version: int) -> None:
        for path in self._folder.glob("weights-*.json"):
            if int(path.stem.partition("-")[2]) < version:
                path.unlink()

    def close(self) -> None:
        if self._is_sender:  # a worker that ends must not take away what the next one reads
            self.forget(1 << 30)


class Arrived:
    def __init__(self, version: int, digest: str, adapter_only: bool, found: list[Any]) -> None:
        self.version, self.digest, self.adapter_only, self._found = version, digest, adapter_only, found

    def tensors(self) -> Iterator[tuple[str, Any]]:
        return iter(self._found)

    def folder(self) -> Path:
        raise AssertionError("these engines read no folders")


def opened(workers: Watched, folder: Path, **engine: Any) -> tuple[Fleet, Events]:
    """A fleet of scripted engines."""
    events = Events()
    engine_made, sync = Scripted(folder=str(folder), **engine), ByFile(folder=str(folder))
    return workers.open(Parts(engine_made, SETUP, sync, None, folder, events)), events


def tensors() -> Iterator[tuple[str, Any]]:
    return iter(TENSORS)


def requests(prompts: Sequence[int], group_size: int = 4, length: int = 5) -> list[Request]:
    """A group for each prompt."""
    params = SamplingParams(max_new_tokens=length)
    return [Request(f"{p}.{i}.0", [1, p], 1000 * p + i, params) for p in prompts for i in range(group_size)]


def assert_complete(found: list[Completion], asked: list[Request], version: int) -> None:
    """Each request once, with what its seed says, all of it drawn by `version`."""
    by_id = {request.request_id: request for request in asked}
    assert sorted(completion.request_id for completion in found) == sorted(by_id)
    for completion in found:
        request = by_id[completion.request_id]
        length = request.params.max_new_tokens
        assert completion.token_ids[1:] == [request.seed] * (length - 1)
        assert completion.logprobs == [expected_logprob(request.seed, place + 1) for place in range(length)]
        assert completion.versions == [version] * length


def collect(fleet: Fleet, count: int, seconds: float = 60.0) -> list[Completion]:
    """So many completions, or as many as there are after so long."""
    found, until = [], time.monotonic() + seconds
    while len(found) < count and time.monotonic() < until:
        found += fleet.poll(0.1)
    return found
