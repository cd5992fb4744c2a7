"""Bits flip, pages vanish, files are cut, lost and swapped: every time it is noticed, named, and survived."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from burnish.errors import ResumeError
from burnish.policy.checkpoint import Checkpointer, LoadedCheckpoint, LocalPlace, load_latest
from burnish.policy.checkpoint.manifest import Corrupt
from burnish.policy.checkpoint.reader import verify
from tests.checkpoint_helpers import assert_is_step, tensors_of
from tests.rank_helpers import ThreadMesh, box, on_ranks, pieces

OTHERS = ("state.json", "manifest.json")


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return tensors_of(step) | {"optimizer": {"exp_avg.w": torch.randn(3000, generator=generator)}}


def save(run: Path, step: int, num_ranks: int = 1, keep: int = 3) -> None:
    def work(mesh: ThreadMesh) -> None:
        checkpointer = Checkpointer(run, keep=keep, mesh=mesh)
        state = {"step": step, "data": {"cursors": [step, 2, 3], "name": "caf\u00e9"}}
        checkpointer.save(step, pieces(tensors(step), mesh.rank, num_ranks, 1), state, wait=True)
        checkpointer.close()

    on_ranks(num_ranks, work)


@pytest.fixture(params=[1, 2], ids=["1 rank", "2 ranks"])
def num_ranks(request) -> int:
    return request.param


@pytest.fixture
def run(tmp_path: Path, num_ranks: int) -> Path:
    """Checkpoints 10 and 20."""
    save(tmp_path, 10, num_ranks)
    save(tmp_path, 20, num_ranks)
    return tmp_path


def files(run: Path) -> list[Path]:
    return sorted((run / "checkpoint-20").iterdir())


def load(run: Path, num_ranks: int) -> list[LoadedCheckpoint]:
    """What each of so many ranks gets: its rows."""

    def work(mesh: ThreadMesh) -> LoadedCheckpoint | None:
        return load_latest(run, ranks=mesh, wanted=lambda group, name, shape: box(shape, mesh.rank, num_ranks, 1))

    return [loaded for loaded in on_ranks(num_ranks, work) if loaded is not None]


def assert_falls_back(run: Path, num_ranks: int) -> str:
    """Every rank goes on from 10, all of it intact; returns why."""
    found = load(run, num_ranks)
    assert len(found) == num_ranks
    for rank, loaded in enumerate(found):
        assert loaded.step == 10 and loaded.state["step"] == 10
        for group, members in tensors(10).items():
            for name, tensor in members.items():
                expected = tensor[box(tuple(tensor.shape), rank, num_ranks, 1).slices()]
                assert torch.equal(loaded.tensors[group][name], expected)
    (reason,) = found[0].rejected
    assert reason.startswith("checkpoint-20: ")
    assert all(loaded.rejected == [reason] for loaded in found)
    return reason


class Contents:
    """What lies where in the files of checkpoint 20, read while they are intact."""

    def __init__(self, run: Path) -> None:
        manifest = json.loads((run / "checkpoint-20" / "manifest.json").read_text())
        self.slices: dict[str, list[tuple[int, int, str]]] = {path.name: [] for path in files(run)}
        for members in manifest["tensors"].values():
            for name, tensor in members.items():
                for part in tensor["slices"]:
                    num_bytes = {"F32": 4, "U8": 1}[tensor["dtype"]]
                    for length in part["shape"]:
                        num_bytes *= length
                    self.slices[part["file"]].append((part["begin"], part["begin"] + num_bytes, name))

    def tensors(self, file: str, begin: int = 0, end: int = 1 << 60) -> set[str]:
        """Tensors with bytes of the file between these; all where that is its header."""
        hit = {name for first, last, name in self.slices[file] if first < end and begin < last}
        return hit or {name for _, _, name in self.slices[file]}


Damage = Callable[[random.Random, Path], tuple[Path, int, int]]
"""Damages checkpoint 20 somewhere; returns the file, and between which bytes."""


def flip(rng: random.Random, run: Path) -> tuple[Path, int, int]:
    paths = files(run)
    path = rng.choices(paths, [path.stat().st_size for path in paths])[0]
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return path, at, at + 1


def zero(rng: random.Random, run: Path) -> tuple[Path, int, int]:
    """A page of 4 KiB, or what there is of it."""
    path = rng.choice(files(run))
    data = bytearray(path.read_bytes())
    page = rng.randrange(0, len(data), 4096)
    end = min(page + 4096, len(data))
    data[page:end] = bytes(end - page)
    path.write_bytes(data)
    return path, page, end


def truncate(rng: random.Random, run: Path) -> tuple[Path, int, int]:
    path = rng.choice(files(run))
    size = rng.randrange(path.stat().st_size)
    os.truncate(path, size)
    return path, size, 1 << 60


def lose(rng: random.Random, run: Path) -> tuple[Path, int, int]:
    path = rng.choice(files(run))
    path.unlink()
    return path, 0, 1 << 60


def from_another_step(rng: random.Random, run: Path) -> tuple[Path, int, int]:
    path = rng.choice(files(run))
    shutil.copy(run / "checkpoint-10" / path.name, path)
    return path, 0, 1 << 60


def from_another_file(rng: random.Random, run: Path) -> tuple[Path, int, int]:
    """Another rank's, or another group's."""
    path, other = rng.sample(files(run), 2)
    shutil.copy(other, path)
    return path, 0, 1 << 60


DAMAGES: list[Damage] = [flip, flip, flip, zero, truncate, lose, from_another_step, from_another_file]


def corrupt_often(run: Path, num_ranks: int, trials: int) -> None:
    rng, contents = random.Random(0), Contents(run)
    backup, kinds = run.parent / f"{run.name}-backup", set()
    shutil.copytree(run / "checkpoint-20", backup)
    for _ in range(trials):
        damage = rng.choice(DAMAGES)
        path, begin, end = damage(rng, run)
        reason = assert_falls_back(run, num_ranks)
        assert path.name in reason, (damage, reason)
        if path.name not in OTHERS:
            assert any(name in reason for name in contents.tensors(path.name, begin, end)), (damage, reason)
        kinds.add((damage, path.name))
        shutil.copy(backup / path.name, path)
    assert len(kinds) > 20
    assert [loaded.step for loaded in load(run, num_ranks)] == [20] * num_ranks


@pytest.mark.parametrize("trials", [250, pytest.param(1000, marks=pytest.mark.long)])
def test_corruptions_are_noticed_and_named(run, num_ranks, trials):
    corrupt_often(run, num_ranks, trials)


@pytest.mark.parametrize("kind", ["rng", "state.json", "manifest.json"])
def test_bit_after_bit_is_noticed(tmp_path, kind):
    run = tmp_path
    save(run, 20, 2)
    path = next(path for path in files(run) if path.name.startswith(kind))
    good = path.read_bytes()
    bits = 8 * len(good)
    # The manifest has some 10,000: all of both ends, and every 31st between.
    positions = range(bits) if bits < 4000 else [*range(200), *range(200, bits - 400, 31), *range(bits - 400, bits)]
    for position in positions:
        bad = bytearray(good)
        bad[position // 8] ^= 1 << position % 8
        path.write_bytes(bad)
        with pytest.raises(Corrupt):
            verify(LocalPlace(run), 20)
    path.write_bytes(good)
    assert verify(LocalPlace(run), 20) == sum(
        path.stat().st_size for path in files(run) if path.name != "manifest.json"
    )


def test_bytes_added_to_any_file_are_noticed(run, num_ranks):
    for path in files(run):
        good = path.read_bytes()
        path.write_bytes(good + b" ")
        assert path.name in assert_falls_back(run, num_ranks)
        path.write_bytes(good)


def test_a_flipped_bit_names_the_tensor(run, num_ranks):
    path = run / "checkpoint-20" / ("model.safetensors" if num_ranks == 1 else "model-00001-of-00002.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # float32 in the order of their names: embed.weight, then the 0-dim norm.bias, which rank 0 writes
    path.write_bytes(data)
    reason = assert_falls_back(run, num_ranks)
    who = "" if num_ranks == 1 else " (read by rank 0, 1)"  # a number is every rank's
    assert reason == f"checkpoint-20: {path.name}: tensor norm.bias: checksum differs{who}"


def test_shards_swapped_with_each_other(tmp_path):
    save(tmp_path, 10, 2)
    save(tmp_path, 20, 2)
    folder = tmp_path / "checkpoint-20"
    one, two = "optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors"
    assert os.path.getsize(folder / one) == os.path.getsize(folder / two)
    os.rename(folder / one, folder / "other")
    os.rename(folder / two, folder / one)
    os.rename(folder / "other", folder / two)
    reason = assert_falls_back(tmp_path, 2)
    assert f"{one}: tensor exp_avg.w: checksum differs (read by rank 0)" in reason
    assert f"{two}: tensor exp_avg.w: checksum differs (read by rank 1)" in reason


def test_half_a_checkpoint_is_passed_over(run, num_ranks):
    os.rename(run / "checkpoint-20", run / "checkpoint-20.tmp-0a1b2c3d")  # a writer died before the commit
    assert [(loaded.step, loaded.rejected) for loaded in load(run, num_ranks)] == [(10, [])] * num_ranks
    os.rename(run / "checkpoint-20.tmp-0a1b2c3d", run / "checkpoint-20")
    (run / "checkpoint-20" / "manifest.json").unlink()  # half of a copy by hand
    assert "manifest.json: No such file" in assert_falls_back(run, num_ranks)


def test_a_checkpoint_under_another_steps_name(run, num_ranks):
    os.rename(run / "checkpoint-20", run / "checkpoint-30")
    for loaded in load(run, num_ranks):
        assert loaded.step == 10
        assert loaded.rejected == ["checkpoint-30: manifest.json: is of step 20"]


def test_all_corrupt_is_refused_with_every_reason(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 20)
    size = os.path.getsize(tmp_path / "checkpoint-20" / "rng.safetensors")
    os.truncate(tmp_path / "checkpoint-20" / "rng.safetensors", 10)
    (tmp_path / "checkpoint-10" / "state.json").unlink()
    with pytest.raises(ResumeError) as refused:
        load_latest(tmp_path)
    text = str(refused.value)
    assert f"checkpoint-20: rng.safetensors: 10 bytes, {size} were written; of tensor torch" in text
    assert "checkpoint-10: state.json: No such file" in text
    assert str(tmp_path) in text and "cure:" in text


def test_corrupt_checkpoints_are_never_counted_as_kept(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)
    for step in (20, 30):
        os.truncate(tmp_path / f"checkpoint-{step}" / "model.safetensors", 10)
    checkpointer = Checkpointer(tmp_path, keep=2)
    loaded = checkpointer.load_latest()
    assert loaded is not None and loaded.step == 10
    # The run goes on from 10 and comes by 20 again: 20 is replaced, the corrupt 30 cannot hide it, 10 stays.
    checkpointer.save(20, tensors_of(20), {"again": True}, wait=True)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "checkpoint-20"]
    loaded = load_latest(tmp_path)
    assert loaded is not None and (loaded.step, loaded.rejected, loaded.state) == (20, [], {"again": True})
    assert_is_step(loaded.tensors, 20)


def test_an_unreadable_file_counts_as_corrupt(run, num_ranks):
    path = next(path for path in files(run) if path.name.startswith("model"))
    path.unlink()
    path.mkdir()
    assert path.name in assert_falls_back(run, num_ranks)
