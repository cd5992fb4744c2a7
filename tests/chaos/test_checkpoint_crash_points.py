"""The power goes at every operation of a save, a replacement and a deletion: a complete checkpoint always loads."""

from __future__ import annotations

import copy
import itertools
import os
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from burnish.errors import ResumeError
from burnish.policy.checkpoint import Checkpointer, SaveFailed, Storage, load_latest
from tests.checkpoint_helpers import RUN, Folder, MemoryDisk, PowerCut, assert_is_step, tensors_of
from tests.rank_helpers import SharedDisk, ThreadMesh, on_ranks, pieces


def save(disk: Storage, step: int, keep: int = 2) -> None:
    checkpointer = Checkpointer(RUN, keep=keep, storage=disk)
    checkpointer.load_latest()
    checkpointer.save(step, tensors_of(step), {"step": step}, wait=True)
    (event,) = checkpointer.poll()
    assert not isinstance(event, SaveFailed), event


def disk_with(*steps: int) -> MemoryDisk:
    disk = MemoryDisk()
    for step in steps:
        save(disk, step)
    return disk


def disk_with_corrupt_20() -> MemoryDisk:
    disk = disk_with(10, 20)
    file = disk._file(RUN / "checkpoint-20" / "model.safetensors")
    file.data = file.durable = file.data[:-1] + b"?"
    return disk


def every_cut(start: Callable[[], MemoryDisk], work: Callable[[MemoryDisk], None], make: type[MemoryDisk] = MemoryDisk):
    """(operations of `work` before the cut or None for no cut, the disk found afterwards), for all of both."""
    cut = 0
    while True:
        disk = make(start().root, cut_at=cut)
        try:
            work(disk)
        except PowerCut:
            yield from ((cut, image) for image in disk.after_power_cut())
            cut += 1
            continue
        yield from ((None, image) for image in disk.after_power_cut())
        return


@pytest.mark.parametrize(
    ("start", "step", "keep", "before"),
    [
        pytest.param(MemoryDisk, 10, 2, None, id="first save"),
        pytest.param(lambda: disk_with(10), 20, 2, 10, id="second save"),
        pytest.param(lambda: disk_with(10), 20, 1, 10, id="save that replaces the only one"),
        pytest.param(lambda: disk_with(10, 20), 30, 2, 20, id="save that deletes the oldest"),
        pytest.param(lambda: disk_with(10, 20), 30, 1, 20, id="save that deletes two"),
        pytest.param(disk_with_corrupt_20, 20, 2, 10, id="save over a corrupt one"),
        pytest.param(lambda: disk_with(10, 20), 20, 2, 20, id="save over an intact one"),
    ],
)
def test_a_complete_checkpoint_loads_after_a_cut_at_every_operation(start, step, keep, before):
    cuts, found_new = set(), 0
    for cut, disk in every_cut(start, partial(save, step=step, keep=keep)):
        loaded = load_latest(RUN, disk)
        if loaded is None:
            assert before is None and cut is not None
        else:
            assert loaded.step in ({step} if cut is None else {before, step})
            assert loaded.state == {"step": loaded.step}
            assert_is_step(loaded.tensors, loaded.step)
            found_new += loaded.step == step
        if cut not in cuts:  # the run goes on from the first image of each cut
            save(disk, step + 10, keep)
            assert not [name for name in disk.names(RUN) if "." in name], "leftovers of the dead writer"
            again = load_latest(RUN, disk)
            assert again is not None and again.step == step + 10
        cuts.add(cut)
    assert found_new
    # mkdir; four files of create, append, sync; sync_directory, rename, sync_directory: no save is shorter.
    assert step == before or len(cuts) > 15


def save_by_two(disk: SharedDisk, step: int, keep: int = 2) -> None:
    def work(mesh: ThreadMesh) -> None:
        checkpointer = Checkpointer(RUN, keep=keep, storage=disk.of(mesh.rank), mesh=mesh)
        try:
            checkpointer.load_latest()
            checkpointer.save(step, pieces(tensors_of(step), mesh.rank, 2, 1), {"step": step}, wait=True)
            (event,) = checkpointer.poll()
            assert not isinstance(event, SaveFailed), event
        finally:
            checkpointer.close()

    on_ranks(2, work)


def disk_of_two(*steps: int) -> SharedDisk:
    disk = SharedDisk()
    for step in steps:
        save_by_two(disk, step)
    return disk


def orders(start: Folder, step: int, keep: int) -> list[list[int]]:
    """Who does the next operation: rank 0 all of its files first, rank 1 first, in turns, and shuffled twice."""
    free = SharedDisk(start)
    save_by_two(free, step, keep)
    alone = [rank for rank, operation, name in free.log]  # rank 0's end, from the manifest on, comes after all files
    end = next(
        at for at, (_, operation, name) in enumerate(free.log) if (operation, name) == ("create", "manifest.json")
    )
    zero, one = alone[:end].count(0), alone[:end].count(1)
    assert alone[end:].count(1) == 0 and min(zero, one) > 8
    turns = [rank for pair in itertools.zip_longest([0] * zero, [1] * one) for rank in pair if rank is not None]
    shuffled = [random.Random(seed).sample(turns, len(turns)) for seed in (0, 1)]
    return [[0] * zero + [1] * one, [1] * one + [0] * zero, turns, *shuffled]


@pytest.mark.parametrize(
    ("start", "step", "keep", "before"),
    [
        pytest.param((), 10, 2, None, id="first save"),
        pytest.param((10,), 20, 1, 10, id="save that replaces the only one"),
        pytest.param((10, 20), 30, 2, 20, id="save that deletes the oldest"),
    ],
)
def test_a_complete_checkpoint_loads_after_a_cut_at_every_operation_of_two_ranks(start, step, keep, before):
    root, images, found_new = disk_of_two(*start).root, 0, 0
    for number, order in enumerate(orders(copy.deepcopy(root), step, keep)):
        # Once all files are durable rank 0 is alone: what comes then is the same in every order.
        for cut in itertools.count() if number == 0 else range(len(order) + 1):
            disk = SharedDisk(copy.deepcopy(root), order=order, cut_at=cut)
            try:
                save_by_two(disk, step, keep)
            except PowerCut:
                pass
            else:
                cut = None
            for image in disk.after_power_cut():
                loaded = load_latest(RUN, image)
                images += 1
                if loaded is None:
                    assert before is None and cut is not None
                    continue
                assert loaded.step in ({step} if cut is None else {before, step})
                assert loaded.state == {"step": loaded.step}
                assert_is_step(loaded.tensors, loaded.step)
                found_new += loaded.step == step
            if cut is None:
                assert disk.log[-1][0] == 0 and [rank for rank, _, _ in disk.log][: len(order)] == order
                break
            if cut % 7 == 0:  # the run goes on from the last image, on one rank
                save(image, step + 10, keep)
                assert not [name for name in image.names(RUN) if "." in name], "leftovers of the dead writers"
    assert images > 200 and found_new > 5


@pytest.mark.parametrize("dies", [0, 1])
def test_one_rank_dies_at_every_operation_and_the_other_finds_out(dies):
    root, steps = disk_of_two(10).root, []
    for at in itertools.count():
        disk = SharedDisk(copy.deepcopy(root), dies=dies, dies_at=at)
        try:
            save_by_two(disk, 20, keep=1)
        except PowerCut:
            alive = True
        else:
            alive = False
        loaded = load_latest(RUN, disk)
        assert loaded is not None and not loaded.rejected
        assert_is_step(loaded.tensors, loaded.step)
        steps.append(loaded.step)
        again = SharedDisk(disk.root)
        save_by_two(again, 30, keep=1)
        assert again.names(RUN) == ["checkpoint-30"]
        if not alive:
            break
    assert steps == sorted(steps) and steps[0] == 10 and steps[-1] == 20 and len(steps) > 10


def test_a_cut_never_leaves_the_new_one_beside_what_the_run_went_back_behind():
    def go_back_and_save(disk: MemoryDisk) -> None:
        checkpointer = Checkpointer(RUN, keep=3, storage=disk)
        checkpointer.load_latest(at_most=10)
        checkpointer.save(15, tensors_of(15), {"step": 15}, wait=True)

    found = set()
    for cut, image in every_cut(lambda: disk_with(10, 20), go_back_and_save):
        loaded = load_latest(RUN, image)
        assert loaded is not None
        assert_is_step(loaded.tensors, loaded.step)
        assert loaded.step == 15 or "checkpoint-15" not in image.names(RUN)
        assert cut is not None or image.names(RUN) == ["checkpoint-10", "checkpoint-15"]
        found.add(loaded.step)
    assert {10, 15, 20} == found


class NoFileSync(MemoryDisk):
    def sync(self, file: int) -> None:
        self._step()


class NoDirectorySync(MemoryDisk):
    def sync_directory(self, path: Path) -> None:
        self._step()


@pytest.mark.parametrize("broken", [NoFileSync, NoDirectorySync])
def test_the_simulated_disk_shows_what_a_missing_sync_would_lose(broken):
    lost = 0
    for _, disk in every_cut(lambda: disk_with(10), partial(save, step=20, keep=1), broken):
        try:
            lost += load_latest(RUN, disk) is None
        except ResumeError:
            lost += 1
    assert lost > 0


@pytest.mark.parametrize(("start", "keep"), [(lambda: disk_with(10), 2), (lambda: disk_with(10, 20), 1)])
def test_a_disk_error_at_every_operation_leaves_a_complete_checkpoint_and_the_run_goes_on(start, keep):
    whole = MemoryDisk(start().root)
    save(whole, 30, keep)
    failed = 0
    for operation in range(whole.operations):
        disk = MemoryDisk(start().root, fail_at=operation)
        before = load_latest(RUN, disk)
        checkpointer = Checkpointer(RUN, keep=keep, storage=disk)
        checkpointer.save(30, tensors_of(30), {"step": 30}, wait=True)
        (event,) = checkpointer.poll()
        loaded = load_latest(RUN, disk)
        assert before is not None and loaded is not None
        if isinstance(event, SaveFailed):
            failed += 1
            assert event.step == 30 and "No space left" in event.reason
        else:
            assert loaded.step == 30
            assert bool(event.note) == (keep == 1)
        assert_is_step(loaded.tensors, loaded.step)
        checkpointer.save(40, tensors_of(40), {"step": 40}, wait=True)
        (event,) = checkpointer.poll()
        assert not isinstance(event, SaveFailed)
        assert not [name for name in disk.names(RUN) if "." in name]
    assert failed > 15


KILLED_AT_EVERY_OPERATION = """
import os, signal, sys
from pathlib import Path
from burnish.policy.checkpoint import Checkpointer, Storage

class Killed(Storage):
    operations = 0
    def __init__(self, at): self.at = at
    def _step(self):
        if self.operations == self.at: os.kill(os.getpid(), signal.SIGKILL)
        self.operations += 1
    def make_directory(self, path): self._step(); super().make_directory(path)
    def create(self, path): self._step(); return super().create(path)
    def append(self, file, data): self._step(); super().append(file, data)
    def sync(self, file): self._step(); super().sync(file)
    def sync_directory(self, path): self._step(); super().sync_directory(path)
    def rename(self, old, new): self._step(); super().rename(old, new)
    def remove_file(self, path): self._step(); super().remove_file(path)
    def remove_directory(self, path): self._step(); super().remove_directory(path)

at = 0
while True:
    pid = os.fork()  # no torch operator has run in this process yet
    if pid == 0:
        from tests.checkpoint_helpers import tensors_of
        run = Path(sys.argv[1]) / str(at)
        run.mkdir()
        checkpointer = Checkpointer(run, keep=1, storage=Storage())
        checkpointer.save(10, tensors_of(10), {"step": 10}, wait=True)
        checkpointer = Checkpointer(run, keep=1, storage=Killed(at))
        checkpointer.save(20, tensors_of(20), {"step": 20}, wait=True)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status):
        sys.exit(os.WEXITSTATUS(status))
    at += 1
"""


def test_sigkill_at_every_operation_on_a_real_disk(tmp_path):
    root = Path(__file__).parents[2]  # the child imports tests.checkpoint_helpers
    command = [sys.executable, "-c", KILLED_AT_EVERY_OPERATION, str(tmp_path)]
    subprocess.run(command, cwd=root, check=True, timeout=100)
    runs = sorted(tmp_path.iterdir(), key=lambda run: int(run.name))
    steps = []
    for run in runs:
        loaded = load_latest(run)
        assert loaded is not None and not loaded.rejected
        assert_is_step(loaded.tensors, loaded.step)
        steps.append(loaded.step)
        checkpointer = Checkpointer(run, keep=1)
        checkpointer.save(30, tensors_of(30), {}, wait=True)
        assert os.listdir(run) == ["checkpoint-30"]
    assert len(runs) > 20 and steps == sorted(steps) and {10, 20} == set(steps)


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from burnish.policy.checkpoint import Checkpointer
checkpointer = Checkpointer(Path(sys.argv[1]), keep=2)
checkpointer.save(10, {"model": {"w": torch.ones(1000)}}, {}, wait=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # the kernel refuses the byte after 1 MiB
checkpointer.save(20, {"model": {"w": torch.ones(1 << 20)}}, {}, wait=True)
print([type(event).__name__ for event in checkpointer.poll()], end="")
checkpointer.save(30, {"model": {"w": torch.ones(1000)}}, {}, wait=True)
print([type(event).__name__ for event in checkpointer.poll()], end="")
"""


def test_a_write_that_the_kernel_refuses_is_reported_and_leaves_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], check=True, timeout=60, capture_output=True, text=True
    )
    assert done.stdout == "['Saved', 'SaveFailed']['Saved']"
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "checkpoint-30"]
