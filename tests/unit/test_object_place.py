"""Checkpoints in a store, as far as no server is needed; tests/chaos/test_object_store.py has one."""

from __future__ import annotations

import sys

import pytest
import torch

from burnish.errors import ResumeError, UserError
from burnish.launch.stored_run import find_stored_run, refuse_moved
from burnish.policy.checkpoint import Checkpointer, load_latest
from burnish.policy.checkpoint.object_place import ObjectPlace
from burnish.policy.checkpoint.objects import said
from burnish.policy.checkpoint.parts import AHEAD_BYTES, StoredFiles, send
from burnish.recipe.schema import Checkpoint
from tests.object_store_helpers import MemoryObjects


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://user:hunter2@bucket/run", "holds no user, password or key"),
        ("az://container/run?sig=hunter2", "holds no user, password or key"),
        ("gs://bucket/run#hunter2", "holds no user, password or key"),
        ("https://bucket/run", "a store is one of s3://, gs://, az://, file://"),
        ("runs/7b", "a store is one of"),
        ("s3://bucket", "a bucket and a prefix of this run's own"),
        ("s3:///run", "a bucket and a prefix of this run's own"),
        ("file://host/run", "a bucket and a prefix of this run's own"),
    ],
)
def test_a_url_that_is_no_store_or_holds_a_secret_is_refused(url, reason):
    with pytest.raises(ValueError, match="store") as refused:
        Checkpoint.model_validate({"store": url})
    (problem,) = refused.value.errors()
    assert reason in problem["msg"] and "hunter2" not in problem["msg"]


@pytest.mark.parametrize("url", ["s3://bucket/runs/7b", "gs://bucket/a/", "az://container/a", "file:///tmp/a", None])
def test_a_store_is_taken(url):
    assert Checkpoint.model_validate({"store": url}).store == url


def test_what_a_store_says_is_told_in_one_line_without_secrets():
    answer = "<Error><Code>SlowDown</Code><Key>hunter2</Key></Error>"
    text = f"PUT https://me:hunter2@host/a?sig=hunter2 failed: 503\n{answer}\n\nDebug source:\nkind: Timeout, hunter2"
    assert said(ValueError(text)) == "PUT https://host/a failed: 503 SlowDown (timed out)"


def test_without_obstore_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(UserError, match=r"needs obstore\n  cure: pip install \"burnish\[store\]\""):
        ObjectPlace("s3://bucket/run")


def test_a_url_that_the_client_does_not_know_is_refused():
    with pytest.raises(UserError, match=r"s4://bucket/run: no store can be made of it: .*Unable to recognise"):
        ObjectPlace("s4://bucket/run")


def test_a_folder_is_a_store_too(tmp_path):
    place = ObjectPlace(f"file://{tmp_path}/new/run")
    place.claim("run", "a")
    checkpointer = Checkpointer(place, keep=1)
    for step in (10, 20):
        checkpointer.save(step, {"model": {"w": torch.full((3,), float(step))}}, {}, wait=True)
    place.release()
    loaded = load_latest(ObjectPlace(f"file://{tmp_path}/new/run"))
    assert loaded is not None and loaded.step == 20 and loaded.tensors["model"]["w"].tolist() == [20.0] * 3
    names = {path.name.partition(".")[0] for path in (tmp_path / "new" / "run").glob("*.COMMIT")}
    assert names == {"checkpoint-20"}


def test_a_file_is_cut_into_parts_wherever_its_chunks_end():
    objects = MemoryObjects()
    send(objects, "f/a", [b"0123", memoryview(b"456"), b"", b"789abc"], part_bytes=5)
    send(objects, "f/empty", [], part_bytes=5)
    assert {name: bytes(objects.read(f"f/{name}")) for name in objects.tree("f/")} == {
        "a/00000": b"01234",
        "a/00001": b"56789",
        "a/00002": b"abc",
        "empty/00000": b"",
    }
    files = StoredFiles(objects, "f")
    assert files.sizes() == {"a": 13, "empty": 0} and files.size("a") == 13
    whole = b"0123456789abc"
    for begin in range(14):
        for size in (0, 1, 4, 7, 99, None):
            end = None if size is None else begin + size
            assert files.read("a", begin, size) == whole[begin:end], (begin, size)
    assert files.read("empty") == b""
    for missing in ("b", "f/a"):
        with pytest.raises(FileNotFoundError, match="part 00000 is missing"):
            files.read(missing)


class CountingObjects(MemoryObjects):
    reads = 0

    def read(self, name, offset=0, size=None):
        self.reads += 1
        return super().read(name, offset, size)


def test_small_neighbours_are_read_with_one_request_and_large_ones_alone():
    objects, data = CountingObjects(), bytes(range(256)) * (AHEAD_BYTES // 128)
    send(objects, "f/a", [data])
    files = StoredFiles(objects, "f")
    for begin in range(0, 100_000, 1000):
        assert files.read("a", begin, 1000) == data[begin : begin + 1000]
    assert objects.reads == 1
    assert files.read("a", 5, AHEAD_BYTES) == data[5 : 5 + AHEAD_BYTES]
    assert objects.reads == 2


def test_a_failing_part_fails_the_file_and_ends_its_sending():
    objects = MemoryObjects()
    objects.fail_from = 2
    taken = []

    def chunks():
        for number in range(100):
            taken.append(number)
            yield b"x" * 5

    with pytest.raises(ConnectionError, match="the store is away"):
        send(objects, "f/a", chunks(), part_bytes=5)
    assert len(taken) < 20


def test_a_run_is_not_begun_anew_where_its_checkpoints_are_elsewhere(tmp_path):
    here, away = tmp_path / "here", tmp_path / "away"
    (here / "checkpoint-10").mkdir(parents=True)
    (here / "checkpoint-10" / "manifest.json").touch()
    refuse_moved(here, None, None)
    with pytest.raises(ResumeError, match=r"has its checkpoints here.*\n  cure: go on without checkpoint\.store"):
        refuse_moved(here, "s3://bucket/a", None)
    away.mkdir()
    refuse_moved(away, None, None)
    (away / "recipe.json").write_text('{"checkpoint": {"store": "s3://bucket/a"}}')
    refuse_moved(away, None, None)  # it had saved nothing yet
    (away / "events.jsonl").write_text('{"time": "now", "event": "checkpoint_saved", "step": 10}\n')
    refuse_moved(away, "s3://bucket/a", None)
    for store in (None, "s3://bucket/b"):
        with pytest.raises(ResumeError, match=r"has its checkpoints in s3://bucket/a.*\n.*checkpoint\.store=s3://b"):
            refuse_moved(away, store, None)


def test_checkpoints_of_which_no_recipe_can_be_read_are_not_gone_on_from():
    place = ObjectPlace("memory://", objects=MemoryObjects())
    Checkpointer(place, keep=1).save(10, {}, {}, wait=True)
    with pytest.raises(ResumeError, match=r"recipe .* cannot be read: memory:///checkpoint-10: 'recipe\.json'"):
        find_stored_run(place)
