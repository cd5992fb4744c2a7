"""Transports of weights: what arrives is what was sent, or SyncFailed says what is wrong; nothing is left behind."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from burnish.errors import SyncFailed, UserError
from burnish.rollout.sync.broadcast import Broadcast
from burnish.rollout.sync.file import File
from burnish.rollout.sync.shared_memory import SharedMemory
from burnish.rollout.weights import Listing, digest_of
from burnish.rollout.weights_broadcast import _exchange, _join
from burnish.rollout.weights_file import write_version
from burnish.rollout.weights_place import claim_folder, claim_memory
from tests.weight_sync_helpers import same, send, some_tensors

BROADCAST = Broadcast(deadline_seconds=10.0)
SYNCS = [SharedMemory(), File(), BROADCAST]
FILES = SYNCS[:2]


def by_type(sync: Any) -> str:
    return sync.type


@pytest.fixture
def ends(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    sender, receiver = request.param.sender(tmp_path), request.param.receiver()
    yield sender, receiver
    receiver.close()
    sender.close()


every_transport = pytest.mark.parametrize("ends", SYNCS, ids=by_type, indirect=True)
every_file = pytest.mark.parametrize("ends", FILES, ids=by_type, indirect=True)


def test_the_digest_is_of_names_dtypes_shapes_and_bytes_in_any_order():
    tensors = some_tensors()
    digest = digest_of(tensors)
    assert digest == digest_of(reversed(tensors))
    assert digest == digest_of([(name, tensor.clone()) for name, tensor in tensors])
    by_name = dict(tensors)
    others = [
        by_name | {"up": by_name["down"], "down": by_name["up"]},
        by_name | {"up": by_name["up"].reshape(6, 4)},
        by_name | {"up": by_name["up"].view(torch.int32)},
        by_name | {"up": torch.where(torch.arange(6) == 3, -by_name["up"], by_name["up"])},
        {("UP" if name == "up" else name): tensor for name, tensor in tensors},
        {name: tensor for name, tensor in tensors if name != "none"},
    ]
    assert len({digest, *(digest_of(other.items()) for other in others)}) == 7


def test_the_digest_of_a_strided_tensor_is_that_of_its_values():
    weight = torch.arange(12.0).reshape(3, 4)
    assert digest_of([("w", weight.t())]) == digest_of([("w", weight.t().contiguous())])


@every_transport
def test_a_version_arrives_bit_for_bit(ends):
    sender, receiver = ends
    for version in (0, 3):
        tensors = some_tensors(seed=version)
        weights = receiver.receive(send(sender, version, tensors))
        assert (weights.version, weights.adapter_only) == (version, False)
        assert weights.digest == digest_of(tensors) == digest_of(weights.tensors())
        assert same(weights.tensors(), tensors)


@every_transport
def test_the_version_before_can_still_be_had_and_older_ones_cannot(ends):
    sender, _ = ends
    parcels = [send(sender, version, some_tensors(version)) for version in (1, 2, 3)]
    receivers = [FILES[0].receiver() if "folder" in parcels[0] else BROADCAST.receiver() for _ in parcels]
    assert same(receivers[1].receive(parcels[1]).tensors(), some_tensors(2))
    with pytest.raises(SyncFailed, match="version 1"):
        receivers[0].receive(parcels[0])
    sender.forget(3)
    with pytest.raises(SyncFailed, match="version 2"):
        receivers[2].receive(parcels[1])
    assert same(receivers[2].receive(parcels[2]).tensors(), some_tensors(3))


@every_transport
def test_a_receiver_takes_no_older_version_and_no_other_one_of_the_same_number(ends):
    sender, receiver = ends
    first, second = (send(sender, version, some_tensors(version)) for version in (4, 5))
    receiver.receive(second)
    with pytest.raises(SyncFailed, match="version 4 came after those of version 5"):
        receiver.receive(first)
    assert same(receiver.receive(second).tensors(), some_tensors(5))  # a refit
    with pytest.raises(SyncFailed, match="version 5 came twice, with other values"):
        receiver.receive(send(sender, 5, some_tensors(6)))


def test_a_trainer_that_was_started_again_may_begin_at_an_older_version(tmp_path):
    receiver = File().receiver()
    before = File().sender(tmp_path)
    receiver.receive(send(before, 12, some_tensors()))
    after = File().sender(tmp_path)
    assert receiver.receive(send(after, 10, some_tensors())).version == 10


@every_transport
def test_what_was_announced_and_what_is_there_differ(ends):
    sender, receiver = ends
    parcel = send(sender, 1, some_tensors(1)) | {"digest": digest_of(some_tensors(2))}
    with pytest.raises(SyncFailed, match=r"version 1.*announced"):
        receiver.receive(parcel)


def file_of(parcel: dict[str, Any]) -> Path:
    return Path(parcel["folder"]) / "model.safetensors"


@every_file
def test_a_file_that_is_cut_short_is_refused(ends):
    sender, _ = ends
    parcel = send(sender, 1, some_tensors())
    size = file_of(parcel).stat().st_size
    for kept in (size - 1, size // 2, 7, 0):
        os.truncate(file_of(parcel), kept)
        with pytest.raises(SyncFailed, match="version 1"):
            list(FILES[0].receiver().receive(parcel).tensors())
        with pytest.raises(SyncFailed, match="version 1"):
            list(FILES[1].receiver().receive(parcel).tensors())


def test_every_flipped_bit_is_noticed(tmp_path):
    """In the header, in its padding, and in the tensors."""
    sender = File().sender(tmp_path)
    parcel = send(sender, 1, some_tensors())
    whole = file_of(parcel).read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    places = [0, 7, *range(8, 1200, 149), header_end - 1, *range(header_end, len(whole), 11), len(whole) - 1]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        file_of(parcel).write_bytes(damaged)
        with pytest.raises(SyncFailed, match="version 1"):
            list(File().receiver().receive(parcel).tensors())


@every_file
def test_two_swapped_tensors_are_noticed_and_named(ends):
    sender, receiver = ends
    tensors = some_tensors()
    parcel = send(sender, 1, tensors)
    data, by_name = file_of(parcel).read_bytes(), dict(tensors)
    up, down = (by_name[name].numpy().tobytes() for name in ("up", "down"))
    file_of(parcel).write_bytes(data.replace(up, b"?" * 96).replace(down, up).replace(b"?" * 96, down))
    weights = receiver.receive(parcel)
    with pytest.raises(SyncFailed, match="up does not hold what was sent"):
        list(weights.tensors())
    with pytest.raises(SyncFailed, match="up does not hold"):
        weights.folder()


@every_file
def test_a_file_that_lacks_a_tensor_or_is_an_older_version_is_refused(ends, tmp_path):
    sender, _ = ends
    parcel = send(sender, 2, some_tensors(2))
    file_of(parcel).unlink()
    write_version(Path(parcel["folder"]), some_tensors(2)[:-1], adapter_only=False)
    with pytest.raises(SyncFailed, match="version 2"):
        ends[1].receive(parcel)
    file_of(parcel).unlink()
    write_version(Path(parcel["folder"]), some_tensors(1), adapter_only=False)
    with pytest.raises(SyncFailed, match="version 2"):
        ends[1].receive(parcel)


def test_the_listing_names_what_is_wrong_with_a_tensor():
    tensors = dict(some_tensors())
    listing = Listing()
    for name, tensor in tensors.items():
        listing.add(name, tensor)
    assert listing.require("up", tensors["up"], "here") is tensors["up"]
    for name, tensor, words in (
        ("up", tensors["down"], "here: up does not hold what was sent"),
        ("up", tensors["up"].double(), r"here: up is F64 \[4, 6\], it was sent as F32 \[4, 6\]"),
        ("up", tensors["up"][:3], r"here: up is F32 \[3, 6\]"),
        ("new", tensors["up"], "here: new came, which was not sent"),
    ):
        with pytest.raises(SyncFailed, match=words):
            listing.require(name, tensor, "here")


def test_a_file_of_another_machine_says_what_to_use_there(tmp_path):
    parcel = {"version": 1, "sender": 1, "digest": "", "adapter_only": False, "num_bytes": 0, "head_crc32": 0}
    parcel |= {"folder": str(tmp_path / "gone"), "host": "trainer-0"}
    with pytest.raises(SyncFailed, match=r"written on trainer-0.*type: broadcast"):
        SharedMemory().receiver().receive(parcel)


@pytest.mark.parametrize("header_bytes", [64, 2**12])
def test_a_file_is_a_plain_safetensors_file_however_long_its_header_is(tmp_path, header_bytes):
    tensors = [(f"layer.{i}.weight", torch.full((i,), float(i))) for i in range(60)] + some_tensors()
    written = write_version(tmp_path, tensors, adapter_only=False, header_bytes=header_bytes)
    assert same(load_file(tmp_path / "model.safetensors").items(), tensors)
    assert written.listing.digest == digest_of(tensors)


@every_transport
def test_the_folder_is_the_model_s_own_with_the_new_weights(ends, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_text("old")
    weights = ends[1].receive(send(ends[0], 1, some_tensors(), folder=base))
    folder = weights.folder()
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (folder / "config.json").read_text() == "{}"
    assert same(load_file(folder / "model.safetensors").items(), some_tensors())


@every_file
def test_a_full_disk_is_a_sync_that_failed_and_every_rank_has_taken_part(ends):
    tensors, drawn = [*some_tensors(), ("large", torch.zeros(2**20)), ("last", torch.zeros(2))], []

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            drawn.append(name)
            yield name, tensor

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**21, before[1]))
    try:
        with pytest.raises(SyncFailed, match="version 1 cannot be written.*File too large"):
            ends[0].send(1, gathered(), adapter_only=False, folder=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert drawn[-1] == "last"
    assert list(ends[0].root.iterdir()) == []
    assert same(ends[1].receive(send(ends[0], 2, some_tensors())).tensors(), some_tensors())


@every_transport
def test_nothing_is_left_after_close(ends):
    sender, receiver = ends
    parcel = send(sender, 1, some_tensors())
    folder = receiver.receive(parcel).folder()
    assert folder.exists()
    receiver.close()
    sender.close()
    assert not folder.parent.exists()
    other = BROADCAST.receiver() if "key" in parcel else type(receiver)(mapped=True)
    with pytest.raises(SyncFailed, match="version 1"):
        other.receive(parcel)


def test_what_a_killed_trainer_left_in_memory_is_removed_by_the_next_and_a_living_one_s_is_not(tmp_path):
    code = f"""
import sys
from pathlib import Path
from burnish.rollout.weights_place import claim_memory
print(claim_memory(Path({str(tmp_path)!r}))[0], flush=True)
sys.stdin.read()
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None
    theirs = Path(child.stdout.readline().strip())
    (theirs / "000001-1").mkdir()
    ours, release = claim_memory(tmp_path)
    assert theirs.exists()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdin.close()
    child.stdout.close()
    third, release_third = claim_memory(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([ours, third])
    release()
    release_third()


def test_what_a_killed_trainer_left_in_the_run_folder_is_removed_when_it_resumes(tmp_path):
    sender = File().sender(tmp_path)
    send(sender, 3, some_tensors())
    (tmp_path / "weights" / ".partial").mkdir()
    again = File().sender(tmp_path)
    assert list((tmp_path / "weights").iterdir()) == []
    again.close()
    assert not (tmp_path / "weights").exists()


def test_runs_do_not_share_a_folder(tmp_path):
    shared = str(tmp_path / "shared")
    one, other = (claim_folder(tmp_path / place / "run", shared) for place in ("a", "b"))
    assert one != other and one.parent == other.parent == Path(shared)
    assert claim_folder(tmp_path / "a" / "run", shared) == one
    assert socket.gethostname() in one.name  # another machine may have a run of this path
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="no folder for weights"):
        claim_folder(tmp_path / "run", str(tmp_path / "file"))


def received_at_once(receivers: list[Any], parcel: dict[str, Any]) -> list[Any]:
    found: list[Any] = [None] * len(receivers)

    def receive(place: int) -> None:
        found[place] = receivers[place].receive(parcel)

    threads = [threading.Thread(target=receive, args=(place,)) for place in range(len(receivers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_a_broadcast_serves_many_at_once_and_one_that_comes_later(tmp_path):
    sender = BROADCAST.sender(tmp_path)
    tensors = [*some_tensors(), ("large", torch.randn(9 * 2**20))]  # 36 MiB, two chunks
    parcel = send(sender, 1, tensors)
    for weights in received_at_once([BROADCAST.receiver() for _ in range(3)], parcel):
        assert same(weights.tensors(), tensors)
    assert same(BROADCAST.receiver().receive(parcel).tensors(), tensors)
    sender.close()


def test_an_engine_that_asks_and_never_comes_costs_the_others_a_round(tmp_path):
    """It takes a ticket and hangs; the round of two is given up after a third of the deadline."""
    sync = Broadcast(deadline_seconds=4.5)
    sender = sync.sender(tmp_path)
    parcel = send(sender, 1, some_tensors())
    host, port = parcel["address"]
    hung: Any = torch.distributed.TCPStore(host, port, is_master=False, wait_for_workers=False)
    hung.add(f"{parcel['key']}/asked", 1)
    assert same(sync.receiver().receive(parcel).tensors(), some_tensors())
    sender.close()


def test_a_trainer_that_is_there_and_silent_is_given_up_at_the_deadline():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = {"address": list(silent.getsockname()), "key": "1-1", "base": None}
        parcel = {"version": 1, "sender": 1, "digest": "", "num_bytes": 0, "adapter_only": False} | place
        with pytest.raises(SyncFailed, match="version 1"):
            Broadcast(deadline_seconds=0.5).receiver().receive(parcel)


def test_a_slow_broadcast_and_a_folder_give_signs_of_life(tmp_path):
    """By a trainer that has a tensor every 0.06 s, and none for 0.2 s before the first."""
    tensors, listing, signs = some_tensors(), Listing(), list[float]()
    for name, tensor in tensors:
        listing.add(name, tensor)
    store: Any = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("1-1/listing", json.dumps(listing.to_json()))
    store.set("1-1/ticket-0", json.dumps(["round", 1, 2]))
    place = {"address": ["127.0.0.1", store.port], "key": "1-1", "base": None}
    facts = {"version": 1, "sender": 1, "digest": listing.digest, "adapter_only": False}

    def serve() -> None:
        def slowly() -> Iterator[torch.Tensor]:
            for _, tensor in tensors:
                time.sleep(0.06)
                yield tensor

        list(_exchange(_join(tuple(place["address"]), "round", 0, 2, 10.0), slowly(), 10.0))

    trainer = threading.Thread(target=serve)
    started = time.monotonic()
    threading.Timer(0.2, trainer.start).start()
    receiver = BROADCAST.receiver()
    weights = receiver.receive(facts | place, lambda: signs.append(time.monotonic() - started))
    trainer.join()
    assert 3 <= len(signs) <= len(tensors) and min(signs) > 0.2
    count = len(signs)
    weights.folder()
    assert len(signs) == count + len(tensors)
    receiver.close()


def test_the_trainer_forgets_the_listings_of_versions_that_are_gone(tmp_path):
    sender = BROADCAST.sender(tmp_path)
    parcels = [send(sender, version, some_tensors(version)) for version in (1, 2, 3)]
    host, port = parcels[0]["address"]
    store: Any = torch.distributed.TCPStore(host, port, is_master=False, wait_for_workers=False)
    assert [bool(store.get(f"{parcel['key']}/listing")) for parcel in parcels] == [False, True, True]
    sender.close()


def test_a_host_that_is_not_this_machine_s_is_refused(tmp_path):
    with pytest.raises(UserError, match="rollout.sync.host"):
        Broadcast(host="203.0.113.7").sender(tmp_path)
