"""Who may write to a store, and what a machine that has nothing finds there."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import ResumeError, RunFailed, UserError
from burnish.launch.stored_run import claim_store, find_stored_run
from burnish.policy.checkpoint import Checkpointer, Saved, SaveFailed
from burnish.policy.checkpoint.object_place import ObjectPlace
from burnish.policy.checkpoint.store_owner import Rhythm
from tests.checkpoint_helpers import tensors_of
from tests.object_store_helpers import ENVIRONMENT, HURRY, SECRET, Stores
from tests.ranks import PRELOADED

QUICK = Rhythm(beat_seconds=0.05, deadline_seconds=0.4)


def place_at(stores: Stores, url: str, *, along: tuple[Path, ...] = (), direct: bool = True) -> ObjectPlace:
    return ObjectPlace(url, objects=stores.objects(url, direct=direct), along=along)


def save(place: ObjectPlace, step: int) -> Saved | SaveFailed:
    checkpointer = Checkpointer(place, keep=2)
    checkpointer.save(step, tensors_of(step), {"step": step}, wait=True)
    (event,) = checkpointer.poll()
    return event


def test_a_store_without_conditional_writes_is_refused(stores):
    place = place_at(stores, stores.prefix(), direct=False)
    stores.proxy.set(lambda request: "weak")
    with pytest.raises(ResumeError, match=r"ignores `If-None-Match: \*`.*\n  cure: use a store with conditional"):
        place.claim("run", "a", QUICK)
    for answer in ("501 NotImplemented", "403 AccessDenied", "400 ExpiredToken"):
        stores.proxy.set(lambda request, answer=answer: answer if request.method == "PUT" else "pass")
        with pytest.raises(UserError, match=rf"the store refuses: .*{answer[:3]} .*{answer[4:]}"):
            place.claim("run", "a", QUICK)
    stores.proxy.set(lambda request: "503 SlowDown")
    with pytest.raises(RunFailed, match=r"the store does not answer: .*SlowDown.*the same command tries again"):
        place.claim("run", "a", QUICK)
    stores.proxy.set(lambda request: "pass")
    place.claim("run", "a", QUICK)
    place.release()
    assert not [name for name in place.objects.tree("") if "probe" in name]


def test_a_second_run_is_refused_while_the_first_one_lives_and_follows_when_it_has_ended(stores, monkeypatch):
    url = stores.prefix()
    first, second, third = (place_at(stores, url) for _ in range(3))
    first.claim("run-1", "run folder /data/a", QUICK)
    try:
        monkeypatch.setattr(time, "time", lambda: 0.0)  # a clock that jumps back by half a century
        with pytest.raises(ResumeError, match=rf"another run writes here: pid {os.getpid()} on .*run folder /data/a"):
            second.claim("run-2", "run folder /data/b", QUICK)
    finally:
        first.release()
    event = save(first, 10)
    assert isinstance(event, SaveFailed) and "this process must not" in event.reason
    begin = time.monotonic()
    second.claim("run-2", "run folder /data/b", Rhythm(0.05, deadline_seconds=60.0))
    assert time.monotonic() - begin < 10, "what was released is not waited for"
    # The same run again, whose folder is locked by the newcomer: at once. The one before commits no more.
    third.claim("run-2", "run folder /data/b", Rhythm(0.05, deadline_seconds=60.0))
    event = save(second, 10)
    assert isinstance(event, SaveFailed) and "writes here now; this process must not" in event.reason
    assert isinstance(save(third, 10), Saved)
    second.release()
    third.release()


def claim_and_wait(url: str, endpoint: str, claimed: Any) -> None:
    os.environ |= ENVIRONMENT | {"AWS_ENDPOINT_URL": endpoint}
    ObjectPlace(url).claim("run-1", "run folder /data/a", QUICK)
    claimed.set()
    time.sleep(60)


def test_a_killed_owner_is_followed_by_one_of_two_newcomers(stores):
    url = stores.prefix()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    claimed = context.Event()
    process = context.Process(target=claim_and_wait, args=(url, stores.server, claimed))
    process.start()
    assert claimed.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    places = [place_at(stores, url) for _ in range(2)]
    outcomes: list[str] = ["", ""]

    def claim(number: int) -> None:
        try:
            places[number].claim(f"newcomer-{number}", f"run folder /data/{number}", QUICK)
            outcomes[number] = "owner"
        except ResumeError as error:
            outcomes[number] = str(error)

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    winner = outcomes.index("owner")
    assert f"another run writes here: pid {os.getpid()}" in outcomes[1 - winner]
    assert f"/data/{winner}" in outcomes[1 - winner]
    places[winner].release()


def test_an_empty_machine_finds_the_run_and_an_outdated_one_catches_up(stores, tmp_path):
    url = stores.prefix()
    here, empty, outdated = tmp_path / "here", tmp_path / "empty", tmp_path / "outdated"
    for folder in (here, empty, outdated):
        folder.mkdir()
    names = ("recipe.json", "tokens.json", "metrics.jsonl")
    place = place_at(stores, url, along=tuple(here / name for name in names))
    assert find_stored_run(place) is None
    claim_store(place, here)
    (here / "recipe.json").write_text('{"seed": 1}')
    (here / "tokens.json").write_text("{}")
    for step in (10, 20):
        (here / "metrics.jsonl").write_text("".join(f'{{"step": {n}}}\n' for n in range(1, step + 1)))
        save(place, step)
    place.release()

    stored = find_stored_run(place_at(stores, url))
    assert stored is not None and stored.step == 20 and stored.recipe() == {"seed": 1}
    stored.restore(empty)
    assert {name: (empty / name).read_bytes() for name in names} == {n: (here / n).read_bytes() for n in names}
    assert not (empty / "store-owner").exists()

    (outdated / "recipe.json").write_text('{"seed": 1, "stop_after": 5}')
    (outdated / "metrics.jsonl").write_text('{"step": 9, "mine": 1}\n')
    stored.restore(outdated)
    assert (outdated / "metrics.jsonl").read_bytes() == (here / "metrics.jsonl").read_bytes()
    assert "stop_after" in (outdated / "recipe.json").read_text()
    (outdated / "metrics.jsonl").write_text('{"step": 20, "mine": 1}\n')
    stored.restore(outdated)
    assert "mine" in (outdated / "metrics.jsonl").read_text()

    (victim,) = [n for n in place.objects.tree("") if n.startswith("checkpoint-20.") and "along/recipe.json" in n]
    place.objects.put(victim, b'{"seed": 2}')
    older = find_stored_run(place_at(stores, url))
    assert older is not None and older.step == 10 and len(older.files["metrics.jsonl"].splitlines()) == 10


def test_nothing_that_is_said_holds_a_secret(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_SAS_KEY", f"sv=2021&sig={SECRET}")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("AZURE_ALLOW_HTTP", "true")
    for url in ("s3://bucket/run", "az://container/run"):
        place = ObjectPlace(url)
        place.objects.patience = HURRY
        with pytest.raises(RunFailed, match=r"the store does not answer: .*\(Connection refused\)") as refused:
            place.claim("run", "a")
        assert url in str(refused.value) and SECRET not in str(refused.value)
