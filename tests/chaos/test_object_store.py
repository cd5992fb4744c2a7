"""Checkpoints in an S3 server that answers wrongly, late or not at all, and writers that die there."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from burnish.errors import ResumeError, RunFailed
from burnish.policy.checkpoint import Checkpointer, Saved, SaveFailed, load_latest
from burnish.policy.checkpoint.manifest import encode_manifest
from burnish.policy.checkpoint.object_place import ObjectPlace
from burnish.policy.checkpoint.objects import Patience
from burnish.region import Region
from tests.checkpoint_helpers import PowerCut, assert_is_step, tensors_of
from tests.object_store_helpers import ENVIRONMENT, HURRY, SECRET, MemoryObjects, Request, Stores
from tests.rank_helpers import ThreadMesh, on_ranks, pieces
from tests.ranks import PRELOADED

PART_BYTES = 200
"""So that a small checkpoint has files of several parts."""


def place_at(stores: Stores, url: str, patience: Patience = HURRY, *, direct: bool = False) -> ObjectPlace:
    return ObjectPlace(url, objects=stores.objects(url, patience, direct=direct), part_bytes=PART_BYTES)


def in_memory(objects: MemoryObjects) -> ObjectPlace:
    return ObjectPlace("memory://", objects=objects, part_bytes=PART_BYTES)


def save(place: ObjectPlace, step: int, keep: int = 2) -> Saved | SaveFailed:
    """By a process that has just started."""
    checkpointer = Checkpointer(place, keep=keep)
    checkpointer.load_latest()
    return save_on(checkpointer, step)


def save_on(checkpointer: Checkpointer, step: int) -> Saved | SaveFailed:
    checkpointer.save(step, tensors_of(step), {"step": step}, wait=True)
    (event,) = checkpointer.poll()
    return event


def assert_loads(place: ObjectPlace, step: int, rejected: int = 0) -> list[str]:
    loaded = load_latest(place)
    assert loaded is not None and loaded.step == step and len(loaded.rejected) == rejected, loaded
    assert_is_step(loaded.tensors, step)
    assert loaded.state == {"step": step}
    return loaded.rejected


def folders(place: ObjectPlace) -> set[str]:
    """Of checkpoints, committed or not."""
    return {name.split("/")[0] for name in place.objects.tree("") if name.startswith("checkpoint-") and "/" in name}


def test_a_checkpoint_comes_back_and_old_ones_go(stores):
    url = stores.prefix()
    checkpointer = Checkpointer(place_at(stores, url), keep=2)
    outcomes = [save_on(checkpointer, step) for step in (10, 20, 30)]
    assert [(type(event).__name__, event.step) for event in outcomes] == [("Saved", 10), ("Saved", 20), ("Saved", 30)]
    assert outcomes[2].place == f"{url}/checkpoint-30"
    again = place_at(stores, url, direct=True)
    assert again.steps() == [20, 30]
    assert_loads(again, 30)
    tree = again.objects.tree("")
    token = json.loads(bytes(again.objects.read("checkpoint-30.COMMIT")))["token"]
    parts = {name: size for name, size in tree.items() if f".{token}/manifest.json/" in name}
    sizes = [parts[name] for name in sorted(parts)]
    assert set(sizes[:-1]) == {PART_BYTES} and 0 < sizes[-1] <= PART_BYTES and len(sizes) > 2
    assert sorted(parts)[1] == f"checkpoint-30.{token}/manifest.json/00001"
    assert len(folders(again)) == 2 and not [name for name in tree if name.startswith("checkpoint-10")]
    whole = bytes(again.read(30, "manifest.json"))
    assert again.size(30, "manifest.json") == len(whole) == sum(sizes)
    for offset, size in [(0, 1), (199, 2), (150, 400), (200, 200), (len(whole) - 1, 9), (len(whole), 5), (3, 0)]:
        assert bytes(again.read(30, "manifest.json", offset, size)) == whole[offset : offset + size]


def test_two_ranks_write_one_checkpoint_and_each_reads_its_rows(stores):
    url = stores.prefix()
    tensors = {"model": {"embed.weight": torch.arange(40.0).reshape(10, 4)}, "rng": {"torch": torch.arange(3)}}

    def write(mesh: ThreadMesh) -> list[Saved | SaveFailed]:
        checkpointer = Checkpointer(place_at(stores, url), keep=2, mesh=mesh)
        checkpointer.save(10, pieces(tensors, mesh.rank, 2, 1), {}, wait=True)
        return checkpointer.poll()

    def read(mesh: ThreadMesh) -> torch.Tensor:
        rows = Region((10, 4), (3 * mesh.rank, 0), (3, 4))
        checkpointer = Checkpointer(place_at(stores, url), keep=2, mesh=mesh)
        loaded = checkpointer.load_latest(lambda group, name, shape: rows if group == "model" else None)
        assert loaded is not None
        return loaded.tensors["model"]["embed.weight"]

    assert [[type(event) for event in events] for events in on_ranks(2, write)] == [[Saved], [Saved]]
    files = {name.split("/")[1] for name in place_at(stores, url).objects.tree("") if "/" in name}
    assert {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "manifest.json"} <= files
    found = on_ranks(2, read)
    assert torch.equal(torch.cat(found), tensors["model"]["embed.weight"][:6])


@pytest.mark.parametrize("troubles", [["503 SlowDown", "429 TooManyRequests", "500 InternalError"], ["lost"]])
def test_every_request_of_a_save_may_fail_at_first(stores, troubles):
    place = place_at(stores, stores.prefix())
    checkpointer = Checkpointer(place, keep=1)
    save_on(checkpointer, 10)
    met: set[tuple[str, str]] = set()

    def at_first(request: Request) -> str:
        seen = (request.method, request.path) in met
        met.add((request.method, request.path))
        return "pass" if seen else troubles[len(met) % len(troubles)]

    stores.proxy.set(at_first)
    event = save_on(checkpointer, 20)
    assert isinstance(event, Saved) and not event.note
    assert {method for method, _ in met} == {"GET", "PUT", "POST"} and len(met) > 12
    stores.proxy.set(lambda request: "pass")
    assert_loads(place, 20)
    assert len(folders(place)) == 1


@pytest.mark.parametrize("first", ["model.safetensors", "COMMIT"])
def test_a_store_that_goes_away_fails_the_save_and_harms_nothing(stores, first):
    place = place_at(stores, stores.prefix(), HURRY._replace(tries=2))
    save(place, 10)
    checkpointer, away = Checkpointer(place, keep=2), threading.Event()

    def go_away(request: Request) -> str:
        if request.method == "PUT" and first in request.path:
            away.set()
        return "503 SlowDown" if away.is_set() else "pass"

    stores.proxy.set(go_away)
    event = save_on(checkpointer, 20)
    assert isinstance(event, SaveFailed) and away.is_set()
    assert "503 Service Unavailable: SlowDown" in event.reason and SECRET not in event.reason
    stores.proxy.set(lambda request: "pass")
    assert_loads(place, 10)
    assert isinstance(save_on(checkpointer, 30), Saved)
    assert place.steps() == [10, 30] and len(folders(place)) == 2


def test_a_store_that_hangs_is_given_up(stores):
    place = place_at(stores, stores.prefix(), Patience(request_seconds=0.2, tries=2, pause_seconds=0.01))
    checkpointer = Checkpointer(place, keep=2)
    save_on(checkpointer, 10)
    stores.proxy.set(lambda request: "hang" if request.method == "PUT" else "pass")
    begin = time.monotonic()
    event = save_on(checkpointer, 20)
    assert time.monotonic() - begin < 10
    assert isinstance(event, SaveFailed) and "timed out" in event.reason
    stores.proxy.set(lambda request: "hang")
    with pytest.raises(RunFailed, match=r"cannot be read.*timed out"):
        load_latest(place)
    stores.proxy.set(lambda request: "400 ExpiredToken" if "state.json" in request.path else "pass")
    with pytest.raises(ResumeError, match=r"cannot be read.*ExpiredToken"):
        load_latest(place)
    stores.proxy.set(lambda request: "pass")
    assert_loads(place, 10)


def every_cut(start: Callable[[], MemoryObjects], act: Callable[[ObjectPlace], Any]) -> Iterator[MemoryObjects]:
    """The store that is left when the machine dies before or after each operation of `act`, and when it does not."""
    at, done, begin = 0, False, start()
    while not done:
        for after in (False, True):
            objects = MemoryObjects(begin.copy(), cut_at=at, after=after)
            try:
                act(in_memory(objects))
                done = True
            except PowerCut:
                pass
            yield MemoryObjects(objects.store)
        at += 1


def store_with(*steps: int) -> MemoryObjects:
    objects = MemoryObjects()
    for step in steps:
        save(in_memory(objects), step)
    return objects


def store_with_wrong_20() -> MemoryObjects:
    objects = store_with(10, 20)
    (victim,) = [name for name in objects.tree("") if name.startswith("checkpoint-20") and "state.json" in name]
    objects.put(victim, b"?")
    return objects


@pytest.mark.parametrize(
    ("start", "step", "keep", "before"),
    [
        pytest.param(MemoryObjects, 10, 2, None, id="first save"),
        pytest.param(lambda: store_with(10), 20, 1, 10, id="save that replaces the only one"),
        pytest.param(lambda: store_with(10, 20), 30, 1, 20, id="save that deletes two"),
        pytest.param(store_with_wrong_20, 20, 2, 10, id="save over a corrupt one"),
    ],
)
def test_a_complete_checkpoint_loads_wherever_the_machine_dies(start, step, keep, before):
    found = []
    for objects in every_cut(start, lambda place: save(place, step, keep)):
        place = in_memory(objects)
        loaded = load_latest(place)
        found.append(None if loaded is None else loaded.step)
        if loaded is not None:
            assert_is_step(loaded.tensors, loaded.step)
            assert loaded.state == {"step": loaded.step}
        assert isinstance(save(place, step + 10, keep=1), Saved)
        assert_loads(place, step + 10)
        assert len(folders(place)) == 1, "leftovers of the dead writer"
    assert set(found) == {before, step} and len(found) >= 20
    assert found == sorted(found, key=lambda step: step or 0)


def test_a_failure_at_every_operation_leaves_a_complete_checkpoint_and_nothing_else():
    begin = store_with(10)
    whole = MemoryObjects(begin.copy())
    save(in_memory(whole), 20, keep=1)
    failed = 0
    for operation in range(whole.operations + 1):
        objects = MemoryObjects(begin.copy())
        place = in_memory(objects)
        checkpointer = Checkpointer(place, keep=1)
        checkpointer.load_latest()
        objects.fail_from = objects.operations + operation
        event = save_on(checkpointer, 20)
        objects.fail_from = None
        if isinstance(event, SaveFailed):
            failed += 1
            assert "the store is away" in event.reason
            assert_loads(place, 10)
        else:
            assert_loads(place, 20)
        assert isinstance(save_on(checkpointer, 30), Saved)
        assert_loads(place, 30)
        assert len(folders(place)) == 1
    assert failed > 7 and isinstance(event, Saved) and not event.note


def save_and_wait(url: str, endpoint: str, saved: Any) -> None:
    os.environ |= ENVIRONMENT | {"AWS_ENDPOINT_URL": endpoint}
    place = ObjectPlace(url, part_bytes=PART_BYTES)
    save(place, 10)
    saved.set()
    save(place, 20)


@pytest.mark.parametrize("at", ["rng.safetensors", "COMMIT"])
def test_a_process_killed_within_a_request_leaves_nothing_that_is_seen_or_stays(stores, at):
    url = stores.prefix()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    saved = context.Event()
    stores.proxy.set(
        lambda request: "hang" if request.method == "PUT" and at in request.path and saved.is_set() else "pass"
    )
    process = context.Process(target=save_and_wait, args=(url, stores.proxy.url, saved))
    process.start()
    assert stores.proxy.hanging.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    assert process.exitcode == -signal.SIGKILL
    stores.proxy.set(lambda request: "pass")
    place = place_at(stores, url, direct=True)
    assert len(folders(place)) == 2 and place.steps() == [10]
    assert_loads(place, 10)
    assert isinstance(save(place, 30, keep=1), Saved)
    assert len(folders(place)) == 1 and place.steps() == [30]


CORRUPTIONS = {
    "manifest.json": "manifest.json: ",
    "state.json": "state.json: ",
    "model.safetensors": "model.safetensors: ",
    "last of model.safetensors": "model.safetensors: ",
    "COMMIT": "manifest.json: not what was written",
}


@pytest.mark.parametrize("how", ["flipped", "shorter", "missing"])
def test_what_is_wrong_in_the_store_is_named_and_passed_over(how):
    place = in_memory(store_with(10, 20))
    for target, named in CORRUPTIONS.items():
        file = target.removeprefix("last of ")
        names = [name for name in place.objects.tree("") if name.startswith("checkpoint-20.")]
        names = [name for name in names if name.endswith(file) or f"/{file}/" in name]
        victim = names[-1 if target.startswith("last") else 0]
        data = bytes(place.objects.read(victim))
        if how == "missing":
            place.objects.remove([victim])
        else:
            place.objects.put(victim, bytes([data[0] ^ 1]) + data[1:] if how == "flipped" else data[:-1])
        if (how, target) == ("missing", "COMMIT"):
            assert_loads(place, 10)
        else:
            (rejected,) = assert_loads(place, 10, rejected=1)
            assert rejected.startswith(f"checkpoint-20: {named}"), rejected
            assert ("part 00000 is missing" in rejected) == (how == "missing" and not target.startswith("last"))
            assert "norm.bias" in rejected or not target.startswith("last")
        place.objects.put(victim, data)
    assert_loads(place, 20)


def test_a_writer_does_not_replace_what_was_committed_since_it_began():
    place, manifest = in_memory(MemoryObjects()), encode_manifest({"files": {"state.json": {"size": 1}}})
    drafts = [place.begin(10, f"abc{rank}") for rank in range(2)]
    for rank, draft in enumerate(drafts):
        draft.write("state.json", [b"%d" % rank])
    drafts[0].commit(manifest)
    with pytest.raises(FileExistsError, match=r"another writer was first.*checkpoint-10\.COMMIT"):
        drafts[1].commit(manifest)
    drafts[1].abandon()
    assert place.read(10, "state.json") == b"0" and folders(place) == {"checkpoint-10.abc0"}


def test_of_two_writers_of_one_checkpoint_exactly_one_wins(stores):
    for step in range(10, 60, 10):
        url = stores.prefix()
        start, outcomes = threading.Barrier(2), [""] * 2

        def write(rank: int, url: str = url, step: int = step, start=start, outcomes=outcomes) -> None:
            draft = place_at(stores, url, direct=True).begin(step, f"abc{rank}")
            draft.write("state.json", [b"%d" % rank])
            start.wait(10)
            try:
                draft.commit(encode_manifest({"files": {"state.json": {"size": 1}}}))
                outcomes[rank] = "won"
            except FileExistsError as error:
                outcomes[rank] = str(error)
                draft.abandon()

        threads = [threading.Thread(target=write, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert sorted(outcomes, key=len)[0] == "won" and "another writer was first" in max(outcomes, key=len)
        place = place_at(stores, url, direct=True)
        assert place.read(step, "state.json") == b"%d" % outcomes.index("won")
        assert len(folders(place)) == 1


def test_a_rank_that_wrote_to_another_store_is_noticed():
    draft = in_memory(MemoryObjects()).begin(10, "ab12")
    draft.write("model.safetensors", [b"0123456789"])
    manifest = encode_manifest({"files": {"other.safetensors": {"size": 10}}})
    with pytest.raises(OSError, match=r"no bytes are there, 10 were written.*other\.safetensors"):
        draft.commit(manifest)
