"""Bits flip, pages vanish, files are cut, lost and swapped: every time it is noticed, named, and survived."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from burnish.errors import ResumeError
from burnish.policy.checkpoint import Checkpointer, Storage, load_latest
from burnish.policy.checkpoint.manifest import Corrupt
from burnish.policy.checkpoint.reader import read_checkpoint
from tests.checkpoint_helpers import assert_is_step, tensors_of

FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json")


def save(run: Path, step: int, keep: int = 3) -> None:
    generator = torch.Generator().manual_seed(step)
    tensors = tensors_of(step) | {"optimizer": {"exp_avg.w": torch.randn(3000, generator=generator)}}
    state = {"step": step, "data": {"cursors": [step, 2, 3], "name": "caf\u00e9"}}
    Checkpointer(run, keep=keep).save(step, tensors, state, wait=True)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints 10 and 20."""
    save(tmp_path, 10)
    save(tmp_path, 20)
    return tmp_path


def assert_falls_back(run: Path, *named: str) -> None:
    loaded = load_latest(run)
    assert loaded is not None and loaded.step == 10 and loaded.state["step"] == 10
    (reason,) = loaded.rejected
    for name in ("checkpoint-20", *named):
        assert name in reason
    loaded.tensors.pop("optimizer")
    assert_is_step(loaded.tensors, 10)


def test_1000_flipped_bits_are_noticed(run):
    rng = random.Random(0)
    paths = [run / "checkpoint-20" / name for name in FILES]
    total = sum(path.stat().st_size for path in paths)
    for _ in range(1000):
        at = rng.randrange(total)
        path = next(p for i, p in enumerate(paths) if at < sum(q.stat().st_size for q in paths[: i + 1]))
        with open(path, "r+b") as file:
            offset = rng.randrange(path.stat().st_size)
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1 << rng.randrange(8)]))
            file.flush()
            assert_falls_back(run, path.name)
            file.seek(offset)
            file.write(bytes([byte]))
    assert load_latest(run).step == 20


@pytest.mark.parametrize("name", ["rng.safetensors", "state.json", "manifest.json"])
def test_bit_after_bit_is_noticed(run, name):
    path = run / "checkpoint-20" / name
    good = path.read_bytes()
    bits = 8 * len(good)
    # The manifest has some 20,000: all of both ends, and every 31st between.
    positions = range(bits) if bits < 4000 else [*range(200), *range(200, bits - 400, 31), *range(bits - 400, bits)]
    for position in positions:
        bad = bytearray(good)
        bad[position // 8] ^= 1 << position % 8
        path.write_bytes(bad)
        with pytest.raises(Corrupt):
            read_checkpoint(Storage(), path.parent)


def test_a_flipped_bit_names_the_tensor(run):
    path = run / "checkpoint-20" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # float32 in the order of their names: embed.weight, then the 0-dim norm.bias
    path.write_bytes(data)
    assert_falls_back(run, "model.safetensors", "tensor norm.bias", "checksum")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("lost", [1, 8, "all"])
def test_truncated(run, name, lost):
    path = run / "checkpoint-20" / name
    os.truncate(path, 0 if lost == "all" else path.stat().st_size - lost)
    assert_falls_back(run, name)


@pytest.mark.parametrize("name", FILES)
def test_bytes_added(run, name):
    with open(run / "checkpoint-20" / name, "ab") as file:
        file.write(b" ")
    assert_falls_back(run, name)


@pytest.mark.parametrize("name", FILES)
def test_missing(run, name):
    (run / "checkpoint-20" / name).unlink()
    assert_falls_back(run, name, "No such file")


@pytest.mark.parametrize("name", FILES)
def test_zero_page(run, name):
    path = run / "checkpoint-20" / name
    size = min(4096, path.stat().st_size)
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size - size)
        file.write(bytes(size))
    assert_falls_back(run, name)


@pytest.mark.parametrize("name", FILES)
def test_swapped_with_the_same_file_of_another_checkpoint(run, name):
    shutil.copy(run / "checkpoint-10" / name, run / "checkpoint-20" / name)
    loaded = load_latest(run)
    assert loaded is not None and loaded.step == 10
    assert "checkpoint-20" in loaded.rejected[0]


def test_swapped_with_each_other(run):
    folder = run / "checkpoint-20"
    os.rename(folder / "rng.safetensors", folder / "other")
    os.rename(folder / "model.safetensors", folder / "rng.safetensors")
    os.rename(folder / "other", folder / "model.safetensors")
    assert_falls_back(run, "model.safetensors")


def test_a_checkpoint_under_another_steps_name(run):
    os.rename(run / "checkpoint-20", run / "checkpoint-30")
    loaded = load_latest(run)
    assert loaded is not None and loaded.step == 10
    assert loaded.rejected == ["checkpoint-30: manifest.json: is of step 20"]


def test_all_corrupt_is_refused_with_every_reason(run):
    os.truncate(run / "checkpoint-20" / "rng.safetensors", 10)
    (run / "checkpoint-10" / "state.json").unlink()
    with pytest.raises(ResumeError) as refused:
        load_latest(run)
    text = str(refused.value)
    assert "checkpoint-20: rng.safetensors: 10 bytes" in text and "checkpoint-10: state.json" in text
    assert str(run) in text and "cure:" in text


def test_corrupt_checkpoints_are_never_counted_as_kept(run):
    save(run, 30)
    for step in (20, 30):
        os.truncate(run / f"checkpoint-{step}" / "model.safetensors", 10)
    checkpointer = Checkpointer(run, keep=2)
    loaded = checkpointer.load_latest()
    assert loaded is not None and loaded.step == 10
    # The run goes on from 10 and comes by 20 again: 20 is replaced, the corrupt 30 cannot hide it, 10 stays.
    checkpointer.save(20, tensors_of(20), {"again": True}, wait=True)
    assert sorted(os.listdir(run)) == ["checkpoint-10", "checkpoint-20"]
    loaded = load_latest(run)
    assert loaded is not None and (loaded.step, loaded.rejected, loaded.state) == (20, [], {"again": True})


def test_an_unreadable_file_counts_as_corrupt(run):
    (run / "checkpoint-20" / "model.safetensors").unlink()
    (run / "checkpoint-20" / "model.safetensors").mkdir()
    assert_falls_back(run, "model.safetensors")
