"""Checkpoints of several ranks: cut one way, read another, and one rank's trouble is everybody's."""

from __future__ import annotations

import errno
import itertools
import json
import os
import threading
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from burnish.errors import ResumeError, RunFailed
from burnish.model.tensor_bytes import tensor_bytes
from burnish.policy.checkpoint import Checkpointer, LocalPlace, Piece, Saved, SaveFailed, Storage, load_latest
from burnish.region import Region
from tests.rank_helpers import ThreadMesh, box, on_ranks, pieces

LAYOUTS = [(1, 1), (2, 1), (4, 1), (3, 1), (1, 2), (2, 2)]
"""(fsdp, tp)"""


def tensors(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    model = {
        "embed.weight": torch.randn(5, 4, generator=generator),  # 5 rows over 4 ranks are 2, 2, 1 and 0
        "up.weight": torch.randn(8, 6, generator=generator).to(torch.bfloat16),
        "norm.weight": torch.randn(3, generator=generator),
        "scale": torch.randn((), generator=generator),
        "no.rows": torch.empty(0, 4),
        "conv": torch.randn(2, 4, 3, generator=generator).double(),
    }
    moments = {f"exp_avg.{name}": torch.randn(value.shape, generator=generator) for name, value in model.items()}
    return {"model": model, "optimizer": moments | {"step.scale": torch.tensor(float(seed))}, "nothing": {}}


def save(
    folder: Path, step: int, layout: tuple[int, int] = (2, 1), *, keep: int = 3, seed: int | None = None
) -> list[list[Saved | SaveFailed]]:
    """A save by all ranks of a layout; what each of them was told."""

    def work(mesh: ThreadMesh) -> list[Saved | SaveFailed]:
        checkpointer = Checkpointer(folder, keep=keep, mesh=mesh)
        mine = pieces(tensors(step if seed is None else seed), mesh.rank, *layout)
        checkpointer.save(step, mine, {"rank": mesh.rank}, wait=True)
        outcome = checkpointer.poll()
        checkpointer.close()
        return outcome

    return on_ranks(layout[0] * layout[1], work)


def load(folder: Path, layout: tuple[int, int] = (1, 1)):
    """What every rank of a layout gets."""

    def work(mesh: ThreadMesh):
        return load_latest(folder, ranks=mesh, wanted=lambda group, name, shape: box(shape, mesh.rank, *layout))

    return on_ranks(layout[0] * layout[1], work)


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert bytes(tensor_bytes(found.contiguous())) == bytes(tensor_bytes(expected.contiguous()))


def assert_holds(folder: Path, layout: tuple[int, int], step: int) -> None:
    """Every rank of the layout reads, bit for bit, its boxes of `tensors(step)`."""
    whole = tensors(step)
    for rank, loaded in enumerate(load(folder, layout)):
        assert (loaded.step, loaded.rejected, loaded.state) == (step, [], {"rank": 0})
        assert {group: set(members) for group, members in loaded.tensors.items()} == {
            g: set(m) for g, m in whole.items()
        }
        for group, name in [(group, name) for group, members in whole.items() for name in members]:
            expected = whole[group][name]
            assert_equal(loaded.tensors[group][name], expected[box(tuple(expected.shape), rank, *layout).slices()])


@pytest.mark.parametrize("then", LAYOUTS)
def test_every_layout_reads_what_every_other_wrote(tmp_path, then):
    (outcome, *others) = save(tmp_path, 7, then)
    assert isinstance(outcome[0], Saved) and all(other == outcome for other in others)
    for now in LAYOUTS:
        assert_holds(tmp_path, now, 7)


def test_one_two_one(tmp_path):
    save(tmp_path, 1, (1, 1))
    (loaded,) = load(tmp_path)
    for step, layout in [(2, (2, 1)), (3, (1, 1))]:
        parts = load(tmp_path, layout)

        def work(mesh: ThreadMesh, step=step, layout=layout, parts=parts) -> None:
            held = {
                group: {
                    name: Piece(
                        tensor, box(parts[mesh.rank].shapes[group][name], mesh.rank, *layout), _first(mesh, tensor)
                    )
                    for name, tensor in members.items()
                }
                for group, members in parts[mesh.rank].tensors.items()
            }
            checkpointer = Checkpointer(tmp_path, keep=1, mesh=mesh)
            checkpointer.save(step, held, {}, wait=True)
            assert isinstance(checkpointer.poll()[0], Saved)

        on_ranks(layout[0], work)
    (last,) = load(tmp_path)
    assert last.step == 3 and os.listdir(tmp_path) == ["checkpoint-3"]
    for group, members in loaded.tensors.items():
        for name, tensor in members.items():
            assert_equal(last.tensors[group][name], tensor)


def _first(mesh: ThreadMesh, tensor: torch.Tensor) -> bool:
    return mesh.rank == 0 or tensor.ndim > 0


def test_each_rank_writes_files_of_its_own_and_each_element_is_written_once(tmp_path):
    save(tmp_path, 7, (2, 2))
    folder = tmp_path / "checkpoint-7"
    ranks = [f"{group}-{rank:05}-of-00004.safetensors" for group in ("model", "optimizer") for rank in (1, 2, 3, 4)]
    empty = "nothing-00001-of-00004.safetensors"  # a group without a tensor has to be remembered
    assert sorted(os.listdir(folder)) == sorted([*ranks, empty, "manifest.json", "state.json"])
    whole, files = tensors(7), [load_file(folder / name) for name in ranks]
    elements = sum(tensor.numel() for file in files for tensor in file.values())
    assert elements == sum(tensor.numel() for group in whole.values() for tensor in group.values())
    # rank 3 of 4 is fsdp 1, tp 1: the last rows, the last columns
    assert torch.equal(files[3]["up.weight"], whole["model"]["up.weight"][4:, 3:])
    assert "scale" in files[0] and not any("scale" in file for file in files[1:])


def test_a_large_tensor_is_read_slice_by_slice(tmp_path):
    # Rank 0 holds 2 rows, rank 1 holds 18 rows of 4 MiB: slices of 64 and 8 MiB.
    weight = torch.arange(20 * 2**20, dtype=torch.int32).reshape(20, 2**20)

    def work(mesh: ThreadMesh) -> None:
        region = Region((20, 2**20), ((0, 0), (2, 0))[mesh.rank], ((2, 2**20), (18, 2**20))[mesh.rank])
        checkpointer = Checkpointer(tmp_path, keep=1, mesh=mesh)
        checkpointer.save(1, {"model": {"w": Piece(weight[region.slices()], region)}}, {}, wait=True)

    on_ranks(2, work)
    manifest = json.loads((tmp_path / "checkpoint-1" / "manifest.json").read_text())
    slices = manifest["tensors"]["model"]["w"]["slices"]
    assert [(part["offsets"][0], part["shape"][0]) for part in slices] == [(0, 2), (2, 16), (18, 2)]
    part = load_file(tmp_path / "checkpoint-1" / "model-00002-of-00002.safetensors")["w"]
    assert torch.equal(part, weight[2:])
    for first, count, most in [(1, 19, 64), (17, 3, 64), (19, 1, 8)]:
        region = Region((20, 2**20), (first, 0), (count, 2**20))
        tracemalloc.start()  # sees what is read; the result is torch's own memory
        loaded = load_latest(tmp_path, wanted=lambda group, name, shape, region=region: region)
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        assert loaded is not None and torch.equal(loaded.tensors["model"]["w"], weight[first : first + count])
        assert most <= peak < most + 2, f"{peak} MiB beside the result"


def test_what_is_not_wanted_is_not_read(tmp_path):
    save(tmp_path, 7)
    only = load_latest(tmp_path, wanted=lambda group, name, shape: Region.all_of(shape) if group == "model" else None)
    assert only is not None and set(only.tensors["model"]) == set(tensors()["model"])
    assert only.tensors["optimizer"] == {} and only.shapes["optimizer"]["exp_avg.up.weight"] == (8, 6)


class Refusing(Storage):
    """A disk with room for the header of a file and no more."""

    def __init__(self, at: str) -> None:
        self.at = at

    def write(self, path: Path, chunks: Iterable[bytes | memoryview]) -> None:
        if path.name.startswith(self.at):
            super().write(path, itertools.islice(chunks, 1))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        super().write(path, chunks)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_is_full_for_one_rank_fails_the_save_of_all_and_leaves_nothing(tmp_path, rank):
    save(tmp_path, 10)

    def work(mesh: ThreadMesh) -> list[Saved | SaveFailed]:
        storage = Refusing("optimizer") if mesh.rank == rank else Storage()
        checkpointer = Checkpointer(tmp_path, keep=1, mesh=mesh, storage=storage)
        checkpointer.save(20, pieces(tensors(20), mesh.rank, 2, 1), {}, wait=True)
        outcomes = checkpointer.poll()
        assert os.listdir(tmp_path) == ["checkpoint-10"]
        mesh.gather(None)
        if mesh.rank == rank:
            storage.at = "nobody"
        checkpointer.save(30, pieces(tensors(30), mesh.rank, 2, 1), {"rank": mesh.rank}, wait=True)
        return outcomes + checkpointer.poll()

    mine, other = on_ranks(2, work)
    assert mine == other and isinstance(mine[1], Saved)
    assert isinstance(mine[0], SaveFailed) and mine[0].step == 20
    file = f"optimizer-{rank + 1:05}-of-00002.safetensors"
    assert mine[0].reason.startswith(f"rank {rank}: [Errno 28] No space left on device: ") and file in mine[0].reason
    assert os.listdir(tmp_path) == ["checkpoint-30"]
    assert_holds(tmp_path, (1, 1), 30)


def test_free_space_is_compared_with_what_all_ranks_will_write(tmp_path):
    class Small(Storage):
        def free_bytes(self, directory: Path) -> int:
            return 12_000

    def work(mesh: ThreadMesh) -> list[Saved | SaveFailed]:
        checkpointer = Checkpointer(tmp_path, keep=1, mesh=mesh, storage=Small())
        for step, rows in [(1, 1000), (2, 2000)]:  # 8,000 and 16,000 bytes over both ranks
            mine = Piece(torch.zeros(rows), Region((2 * rows,), (mesh.rank * rows,), (rows,)))
            checkpointer.save(step, {"model": {"w": mine}}, {}, wait=True)
        return checkpointer.poll()

    for saved, failed in on_ranks(2, work):
        assert isinstance(saved, Saved) and isinstance(failed, SaveFailed)
        assert "rank 0: " in failed.reason and "MiB needed" in failed.reason
    assert os.listdir(tmp_path) == ["checkpoint-1"]


class Hanging(Storage):
    def __init__(self) -> None:
        self.let = threading.Event()

    def sync(self, file: int) -> None:
        self.let.wait(20)
        super().sync(file)


def test_a_disk_that_hangs_for_one_rank_ends_the_wait_of_all(tmp_path):
    save(tmp_path, 10)
    storage = Hanging()

    def work(mesh: ThreadMesh) -> str:
        storages = [Storage(), storage]
        checkpointer = Checkpointer(tmp_path, keep=1, mesh=mesh, storage=storages[mesh.rank], deadline_seconds=0.3)
        checkpointer.save(20, pieces(tensors(20), mesh.rank, 2, 1), {})
        assert checkpointer.poll() == []
        with pytest.raises(RunFailed) as failed:
            checkpointer.wait()
        mesh.gather(None)
        storage.let.set()
        checkpointer.close()
        return str(failed.value)

    mine, other = on_ranks(2, work)
    assert mine == other and "checkpoint-20 of rank 1 has not reached the disk" in mine
    assert_holds(tmp_path, (2, 1), 10)


def test_poll_commits_without_waiting_once_the_slowest_rank_is_done(tmp_path):
    storage = Hanging()
    steps: list[int] = []

    def work(mesh: ThreadMesh) -> list[Saved | SaveFailed]:
        checkpointer = Checkpointer(tmp_path, keep=1, mesh=mesh, storage=[Storage(), storage][mesh.rank])
        checkpointer.save(20, pieces(tensors(20), mesh.rank, 2, 1), {"rank": mesh.rank})
        for step in range(2000):  # as a run does at every step
            outcome = checkpointer.poll()
            if outcome:
                steps.append(step)
                return outcome
            if step == 5:
                assert not (tmp_path / "checkpoint-20").exists()
                storage.let.set()
            storage.let.wait(0.001)
        raise AssertionError("never committed")

    mine, other = on_ranks(2, work)
    assert mine == other and isinstance(mine[0], Saved) and steps[0] == steps[1] > 5
    assert_holds(tmp_path, (1, 1), 20)


def test_a_bug_on_one_rank_is_raised_on_all(tmp_path):
    class Broken(Storage):
        def create(self, path: Path) -> int:
            raise ZeroDivisionError("by nobody")

    def work(mesh: ThreadMesh) -> BaseException:
        checkpointer = Checkpointer(tmp_path, keep=1, mesh=mesh, storage=[Storage(), Broken()][mesh.rank])
        checkpointer.save(1, pieces(tensors(1), mesh.rank, 2, 1), {})
        with pytest.raises((RunFailed, ZeroDivisionError)) as raised:
            checkpointer.wait()
        return raised.value

    here, there = on_ranks(2, work)
    assert str(here) == "rank 1: ZeroDivisionError: by nobody" and isinstance(there, ZeroDivisionError)


def test_ranks_that_do_not_share_their_disk_are_told_so(tmp_path):
    def work(mesh: ThreadMesh) -> list[Saved | SaveFailed]:
        own = tmp_path / str(mesh.rank)
        own.mkdir()
        checkpointer = Checkpointer(own, keep=1, mesh=mesh)
        checkpointer.save(1, pieces(tensors(1), mesh.rank, 2, 1), {}, wait=True)
        return checkpointer.poll()

    mine, other = on_ranks(2, work)
    assert mine == other and isinstance(mine[0], SaveFailed)
    assert "-00002-of-00002.safetensors" in mine[0].reason and "share this file system" in mine[0].reason
    assert os.listdir(tmp_path / "0") == []


class Flipping(LocalPlace):
    """A wire that flips a bit of the named file for this rank alone."""

    def read(self, step: int, file: str, offset: int = 0, size: int | None = None) -> bytearray:
        data = super().read(step, file, offset, size)
        if (step, file) == (20, "model-00002-of-00002.safetensors") and offset > 0:
            data[0] ^= 1
        return data


def test_what_one_rank_cannot_read_is_read_by_none(tmp_path):
    for step in (10, 20):
        save(tmp_path, step)

    def work(mesh: ThreadMesh):
        place = Flipping(tmp_path) if mesh.rank == 1 else LocalPlace(tmp_path)
        checkpointer = Checkpointer(place, keep=1, mesh=mesh)
        loaded = checkpointer.load_latest(lambda group, name, shape: box(shape, mesh.rank, 2, 1))
        checkpointer.save(15, pieces(tensors(15), mesh.rank, 2, 1), {"rank": mesh.rank}, wait=True)
        return loaded

    both = on_ranks(2, work)
    file = "model-00002-of-00002.safetensors"
    for loaded in both:
        assert loaded.step == 10
        assert len(loaded.rejected) == 1
        assert loaded.rejected[0].startswith(f"checkpoint-20: {file}: tensor ")
        assert loaded.rejected[0].endswith("checksum differs (read by rank 1)")
    assert os.listdir(tmp_path) == ["checkpoint-15"], "20 was passed over: it neither counts nor hides 15"
    assert_holds(tmp_path, (1, 1), 15)


def test_a_shard_of_another_step_of_equal_size_is_noticed(tmp_path):
    for step in (10, 20):
        save(tmp_path, step)
    for group in ("model", "optimizer"):
        name = f"{group}-00002-of-00002.safetensors"
        (tmp_path / "checkpoint-20" / name).write_bytes((tmp_path / "checkpoint-10" / name).read_bytes())
        for loaded in load(tmp_path, (2, 1)):
            assert loaded.step == 10 and f"{name}: tensor " in loaded.rejected[0]
        save(tmp_path, 20)  # the corrupt one is replaced, though nobody had looked at it before
        assert_holds(tmp_path, (2, 1), 20)


@pytest.mark.parametrize("error", [TimeoutError("no answer in 60 s"), ConnectionResetError("reset")])
def test_a_place_that_does_not_answer_is_no_reason_to_take_an_older_one(tmp_path, error):
    class Silent(LocalPlace):
        def read(self, step: int, file: str, offset: int = 0, size: int | None = None) -> bytearray:
            if step == 20 and offset > 0:
                raise error
            return super().read(step, file, offset, size)

    for step in (10, 20):
        save(tmp_path, step)

    def work(mesh: ThreadMesh) -> str:
        place = Silent(tmp_path) if mesh.rank == 1 else LocalPlace(tmp_path)
        with pytest.raises(RunFailed) as failed:
            load_latest(place, ranks=mesh)
        return str(failed.value)

    assert all("cannot be read" in message for message in on_ranks(2, work))


def test_all_corrupt_is_refused_on_every_rank(tmp_path):
    save(tmp_path, 10)
    os.truncate(tmp_path / "checkpoint-10" / "model-00002-of-00002.safetensors", 100)

    def work(mesh: ThreadMesh) -> str:
        with pytest.raises(ResumeError) as refused:
            load_latest(tmp_path, ranks=mesh, wanted=lambda group, name, shape: box(shape, mesh.rank, 2, 1))
        return str(refused.value)

    mine, other = on_ranks(2, work)
    assert mine == other and "model-00002-of-00002.safetensors" in mine and "tensor" in mine


def test_a_clock_that_jumps_changes_nothing(tmp_path):
    for step in (9, 10, 11):
        save(tmp_path, step)
    for step, seconds in [(9, 4e9), (10, 1e9), (11, 0)]:  # the oldest is from the year 2096, the newest from 1970
        for path in [*(tmp_path / f"checkpoint-{step}").iterdir(), tmp_path / f"checkpoint-{step}"]:
            os.utime(path, (seconds, seconds))
    assert_holds(tmp_path, (2, 1), 11)
    save(tmp_path, 12, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-11", "checkpoint-12"]


class Counting(Storage):
    files = 0

    def create(self, path: Path) -> int:
        self.files += 1
        return super().create(path)


def test_the_same_checkpoint_is_not_written_twice(tmp_path):
    def work(mesh: ThreadMesh) -> list[Saved | SaveFailed]:
        storage = Counting()
        checkpointer = Checkpointer(tmp_path, keep=1, mesh=mesh, storage=storage)
        for _ in range(2):
            checkpointer.save(10, pieces(tensors(10), mesh.rank, 2, 1), {"rank": mesh.rank}, wait=True)
            assert storage.files == (5, 2)[mesh.rank]  # rank 0: three groups, state, manifest
            mesh.gather(None)
        return checkpointer.poll()

    mine, other = on_ranks(2, work)
    assert mine == other and [type(outcome) for outcome in mine] == [Saved, Saved]
    assert_holds(tmp_path, (1, 1), 10)


def test_an_intact_checkpoint_that_this_process_has_not_seen_stays_as_it_is(tmp_path):
    save(tmp_path, 10)
    before = os.stat(tmp_path / "checkpoint-10" / "manifest.json").st_ino
    for outcome in save(tmp_path, 10, seed=99):
        assert isinstance(outcome[0], Saved)
    assert os.stat(tmp_path / "checkpoint-10" / "manifest.json").st_ino == before
    assert os.listdir(tmp_path) == ["checkpoint-10"]
    assert_holds(tmp_path, (1, 1), 10)


def test_a_run_that_goes_back_replaces_what_it_went_back_behind(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)

    def work(mesh: ThreadMesh) -> None:
        checkpointer = Checkpointer(tmp_path, keep=3, mesh=mesh)
        loaded = checkpointer.load_latest(at_most=19)
        assert loaded is not None and loaded.step == 10
        checkpointer.save(20, pieces(tensors(99), mesh.rank, 2, 1), {"rank": mesh.rank}, wait=True)

    on_ranks(2, work)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "checkpoint-20"]
    loaded = load_latest(tmp_path)
    assert loaded is not None and loaded.step == 20
    assert_equal(loaded.tensors["model"]["embed.weight"], tensors(99)["model"]["embed.weight"])
