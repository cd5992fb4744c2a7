from __future__ import annotations

import json
import os
import pickletools
import threading
import zlib

import pytest
import torch
from safetensors.torch import load_file

from burnish.errors import ResumeError
from burnish.policy.checkpoint import Checkpointer, Saved, SaveFailed, Storage, load_latest
from burnish.policy.checkpoint.manifest import encode_header, encode_manifest, tensor_bytes
from tests.checkpoint_helpers import RUN, MemoryDisk, assert_is_step, tensors_of

BIT_EXACT = torch.tensor([0.1, -0.0, float("nan"), float("inf"), 1e-45])

TENSORS = {
    "float32": BIT_EXACT,
    "bfloat16": BIT_EXACT.to(torch.bfloat16),
    "float16": BIT_EXACT.to(torch.float16),
    "float64": BIT_EXACT.double(),
    "float8": BIT_EXACT.to(torch.float8_e4m3fn),
    "int64": torch.tensor([-1, 1 << 62]),
    "uint8": torch.arange(255, dtype=torch.uint8),
    "bool": torch.tensor([[True], [False], [True]]),
    "complex64": torch.tensor([1 + 2j]),
    "0-dim": torch.tensor(3.5),
    "empty": torch.empty(0, 7),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "strided": torch.arange(10)[::3],
    "parameter": torch.nn.Parameter(torch.ones(2)),
}


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor_bytes(tensor.detach().contiguous()))


def test_every_dtype_shape_and_layout_comes_back_bit_for_bit(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=1)
    state = {"cursor": 80, "rate": 0.1 + 0.2, "name": "\u00e9", "nested": [1, None, {"a": True}]}
    checkpointer.save(7, {"model": TENSORS, "rng": {}}, state, wait=True)
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert (loaded.step, loaded.state, loaded.rejected) == (7, state, [])
    assert loaded.path == tmp_path / "checkpoint-7"
    assert loaded.tensors["rng"] == {} and set(loaded.tensors["model"]) == set(TENSORS)
    for name, tensor in TENSORS.items():
        found = loaded.tensors["model"][name]
        assert (found.dtype, found.shape, bits(found)) == (tensor.dtype, tensor.shape, bits(tensor)), name


def test_the_files_are_the_public_safetensors_format_and_hold_no_pickle(tmp_path):
    Checkpointer(tmp_path, keep=1).save(7, {"model": TENSORS, "rng": {}}, {}, wait=True)
    files = sorted(os.listdir(tmp_path / "checkpoint-7"))
    assert files == ["manifest.json", "model.safetensors", "rng.safetensors", "state.json"]
    read = load_file(tmp_path / "checkpoint-7" / "model.safetensors")
    assert {name: bits(tensor) for name, tensor in read.items()} == {n: bits(t) for n, t in TENSORS.items()}
    assert load_file(tmp_path / "checkpoint-7" / "rng.safetensors") == {}
    for file in files:
        with pytest.raises(ValueError):
            list(pickletools.genops((tmp_path / "checkpoint-7" / file).read_bytes()))


def test_a_manifest_by_hand_with_two_shards_reads_as_one_tensor(tmp_path):
    # weight = [[0, 1], [2, 3], [4, 5]]: rows 0 and 1 in the first file, row 2 in the second
    weight = torch.arange(6.0).reshape(3, 2)
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    manifest = {"format": 1, "step": 4, "files": {"state.json": {"size": 2, "crc32": zlib.crc32(b"{}")}}}
    (folder / "state.json").write_bytes(b"{}")
    slices = []
    for file, begin, end in [
        ("model-00001-of-00002.safetensors", 0, 2),
        ("model-00002-of-00002.safetensors", 2, 3),
    ]:
        part = weight[begin:end]
        header, _ = encode_header({"weight": part})
        (folder / file).write_bytes(header + bits(part))
        size = len(header) + part.nbytes
        manifest["files"][file] = {"size": size, "header_size": len(header), "header_crc32": zlib.crc32(header)}
        slices.append({"file": file, "offsets": [begin, 0], "shape": list(part.shape), "crc32": zlib.crc32(bits(part))})
    manifest["tensors"] = {"model": {"weight": {"dtype": "F32", "shape": [3, 2], "slices": slices}}}
    (folder / "manifest.json").write_bytes(encode_manifest(manifest))
    loaded = load_latest(tmp_path)
    assert loaded is not None and torch.equal(loaded.tensors["model"]["weight"], weight)


def test_a_newer_format_is_refused_by_name_and_not_passed_over(tmp_path):
    Checkpointer(tmp_path, keep=1).save(3, tensors_of(3), {}, wait=True)
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "manifest.json").write_bytes(encode_manifest({"format": 2, "step": 4}))
    with pytest.raises(ResumeError, match=r"checkpoint-4: manifest\.json: format 2; this version of Burnish reads"):
        load_latest(tmp_path)


def test_the_manifest_is_json(tmp_path):
    Checkpointer(tmp_path, keep=1).save(7, tensors_of(7), {}, wait=True)
    manifest = json.loads((tmp_path / "checkpoint-7" / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"]) == (1, 7)
    # arange(6).reshape(2, 3) + 7, little-endian float32
    crc32 = zlib.crc32(torch.arange(7.0, 13.0).numpy().astype("<f4").tobytes())
    assert manifest["tensors"]["model"]["embed.weight"] == {
        "dtype": "F32",
        "shape": [2, 3],
        "slices": [{"file": "model.safetensors", "offsets": [0, 0], "shape": [2, 3], "crc32": crc32}],
    }


class Slow(Storage):
    """Writes nothing until it is let."""

    def __init__(self) -> None:
        self.let = threading.Event()

    def make_directory(self, path) -> None:
        assert self.let.wait(20)
        super().make_directory(path)


def test_training_may_change_the_tensors_while_they_are_written(tmp_path):
    storage = Slow()
    checkpointer = Checkpointer(tmp_path, keep=2, storage=storage)
    weight, state = torch.zeros(3), {"cursor": [1]}
    checkpointer.save(1, {"model": {"w": weight}}, state)
    assert checkpointer.poll() == []
    weight += 1
    state["cursor"].append(2)
    storage.let.set()
    checkpointer.save(2, {"model": {"w": weight}}, state)  # waits for the first
    weight += 1
    checkpointer.wait()
    assert [(type(event), event.step) for event in checkpointer.poll()] == [(Saved, 1), (Saved, 2)]
    assert checkpointer.poll() == []
    for step, value, cursor in [(1, 0.0, [1]), (2, 1.0, [1, 2])]:
        os.rename(tmp_path / f"checkpoint-{step}", tmp_path / "one-of-the-two")
        os.mkdir(tmp_path / str(step))
        os.rename(tmp_path / "one-of-the-two", tmp_path / str(step) / f"checkpoint-{step}")
        loaded = load_latest(tmp_path / str(step))
        assert loaded is not None
        assert loaded.tensors["model"]["w"].tolist() == [value] * 3 and loaded.state == {"cursor": cursor}
    checkpointer.close()


class HeldBack(dict):
    """Tensors that the copying thread gets when it is let."""

    def __init__(self, tensors) -> None:
        super().__init__(tensors)
        self.let = threading.Event()

    def items(self):
        assert self.let.wait(20)
        return super().items()


def test_with_overlap_save_returns_at_once_and_the_optimizer_waits_for_the_copy(tmp_path):
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = torch.ones(3)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.overlap(optimizer)
    tensors, seen = HeldBack({"w": weight}), []
    checkpointer.save(1, {"model": tensors}, {})

    def let() -> None:
        seen.append(weight.tolist())
        tensors.let.set()

    threading.Timer(0.2, let).start()
    optimizer.step()
    assert seen == [[0.0, 0.0, 0.0]] and weight.tolist() == [-1.0, -1.0, -1.0]
    checkpointer.close()
    loaded = load_latest(tmp_path)
    assert loaded is not None and loaded.tensors["model"]["w"].tolist() == [0.0, 0.0, 0.0]


def test_staging_follows_a_tensor_that_changes_its_shape(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=1)
    for step, tensor in enumerate([torch.ones(4), torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bfloat16)]):
        checkpointer.save(step, {"model": {"w": tensor}}, {}, wait=True)
        loaded = load_latest(tmp_path)
        assert loaded is not None and bits(loaded.tensors["model"]["w"]) == bits(tensor)


def test_the_last_k_are_kept(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=3)
    for step in (1, 2, 10, 20, 100):
        checkpointer.save(step, tensors_of(step % 256), {})
    checkpointer.close()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "checkpoint-100", "checkpoint-20"]


def test_nothing_but_finished_checkpoints_is_seen_and_leftovers_go_at_the_next_save(tmp_path):
    for name in ("checkpoint-30.tmp-0a1b", "checkpoint-5.trash-99ff", "model", "checkpoint-x", "checkpoint-007"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    checkpointer = Checkpointer(tmp_path, keep=1)
    assert checkpointer.load_latest() is None
    assert (tmp_path / "checkpoint-30.tmp-0a1b").exists(), "loading changes nothing"
    checkpointer.save(10, tensors_of(10), {}, wait=True)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-007", "checkpoint-10", "checkpoint-x", "model"]


def test_a_full_disk_is_seen_before_writing():
    disk = MemoryDisk()
    checkpointer = Checkpointer(RUN, keep=2, storage=disk)
    checkpointer.save(10, tensors_of(10), {}, wait=True)
    # 6 float32 + 1 float32 + 2 uint8 + the state "{}"
    disk.free, written = 24 + 4 + 2 + 2 - 1, disk.operations
    checkpointer.save(20, tensors_of(20), {}, wait=True)
    (saved, failed) = checkpointer.poll()
    assert isinstance(saved, Saved) and (saved.step, saved.num_bytes) == (10, 32)
    assert isinstance(failed, SaveFailed) and failed.step == 20
    assert "No space left on device" in failed.reason and "MiB free" in failed.reason
    assert disk.operations == written
    disk.free += 1
    checkpointer.save(30, tensors_of(30), {}, wait=True)
    loaded = checkpointer.load_latest()
    assert loaded is not None and loaded.step == 30
    assert_is_step(loaded.tensors, 30)


def test_a_bug_in_the_background_is_not_swallowed(tmp_path):
    class Broken(Storage):
        def free_bytes(self, directory) -> int:
            raise ZeroDivisionError

    checkpointer = Checkpointer(tmp_path, keep=1, storage=Broken())
    checkpointer.save(1, tensors_of(1), {})
    with pytest.raises(ZeroDivisionError):
        checkpointer.wait()


def test_an_intact_checkpoint_of_the_same_step_stays_as_it_is(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(10, tensors_of(10), {}, wait=True)
    before = os.stat(tmp_path / "checkpoint-10" / "manifest.json").st_ino
    checkpointer.save(10, tensors_of(10), {}, wait=True)
    assert os.stat(tmp_path / "checkpoint-10" / "manifest.json").st_ino == before
    assert [type(event) for event in checkpointer.poll()] == [Saved, Saved]
