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
from burnish.model.tensor_bytes import tensor_bytes
from burnish.policy.checkpoint import Checkpointer, Saved, SaveFailed, Storage, load_latest
from burnish.policy.checkpoint.manifest import encode_header, encode_manifest
from burnish.policy.checkpoint.staging import Staging
from burnish.region import Region
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
    assert (loaded.name, loaded.place) == ("checkpoint-7", str(tmp_path / "checkpoint-7"))
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


def crc(data: bytes) -> int:
    return zlib.crc32(data)


def test_a_manifest_by_hand_with_three_slices_reads_as_one_tensor(tmp_path):
    # weight = [[0, 1], [2, 3], [4, 5]]: rows 0 and 1 in the first file, under a checksum each, row 2 in the second
    weight = torch.arange(6.0).reshape(3, 2)
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    (folder / "state.json").write_bytes(b"{}")
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    files = {"state.json": {"size": 2, "head": 2, "crc32": crc(b"{}")}}
    heads = {}
    for file, part in [(first, weight[:2]), (second, weight[2:])]:
        header, _ = encode_header({"weight": part})
        (folder / file).write_bytes(header + bits(part))
        files[file] = {"size": len(header) + part.nbytes, "head": len(header), "crc32": crc(header)}
        heads[file] = len(header)
    slices = [
        {
            "file": file,
            "begin": heads[file] + skipped,
            "offsets": [row, 0],
            "shape": [1, 2],
            "crc32": crc(bits(weight[row])),
        }
        for file, row, skipped in [(first, 0, 0), (first, 1, 8), (second, 2, 0)]
    ]
    tensors = {"model": {"weight": {"dtype": "F32", "shape": [3, 2], "slices": slices}}}
    manifest = {"format": 2, "step": 4, "files": files, "tensors": tensors}
    (folder / "manifest.json").write_bytes(encode_manifest(manifest))
    loaded = load_latest(tmp_path)
    assert loaded is not None and torch.equal(loaded.tensors["model"]["weight"], weight)
    # the second column alone, as a rank of a tensor-parallel run would want it
    column = load_latest(tmp_path, wanted=lambda group, name, shape: Region(shape, (0, 1), (3, 1)))
    assert column is not None and column.tensors["model"]["weight"].tolist() == [[1.0], [3.0], [5.0]]
    assert column.shapes == {"model": {"weight": (3, 2)}}


@pytest.mark.parametrize("number", [1, 3])
def test_another_format_is_refused_by_name_and_not_passed_over(tmp_path, number):
    Checkpointer(tmp_path, keep=1).save(3, tensors_of(3), {}, wait=True)
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "manifest.json").write_bytes(encode_manifest({"format": number, "step": 4}))
    message = rf"checkpoint-4: manifest\.json: format {number}; this version of Burnish reads format 2"
    with pytest.raises(ResumeError, match=message):
        load_latest(tmp_path)


def test_the_manifest_is_json(tmp_path):
    Checkpointer(tmp_path, keep=1).save(7, tensors_of(7), {}, wait=True)
    manifest = json.loads((tmp_path / "checkpoint-7" / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"]) == (2, 7)
    assert manifest["files"]["state.json"] == {"size": 2, "head": 2, "crc32": crc(b"{}")}
    # arange(6).reshape(2, 3) + 7, little-endian float32
    data = torch.arange(7.0, 13.0).numpy().astype("<f4").tobytes()
    head = manifest["files"]["model.safetensors"]["head"]
    assert manifest["tensors"]["model"]["embed.weight"] == {
        "dtype": "F32",
        "shape": [2, 3],
        "slices": [
            {"file": "model.safetensors", "begin": head, "offsets": [0, 0], "shape": [2, 3], "crc32": crc(data)}
        ],
    }
    assert (tmp_path / "checkpoint-7" / "model.safetensors").read_bytes()[head : head + 24] == data


def forged(folder, change) -> None:
    """A manifest that somebody changed and sealed again."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["crc32"]
    change(manifest)
    path.write_bytes(encode_manifest(manifest))


def a_slice(manifest) -> dict:
    return manifest["tensors"]["model"]["embed.weight"]["slices"][0]


FORGERIES = {
    "a file beside the run": lambda m: m["files"].update({"../secret": m["files"]["state.json"]}),
    "an absolute file": lambda m: m["files"].update({"/etc/passwd": m["files"]["state.json"]}),
    "more than the file holds": lambda m: m["tensors"]["model"]["embed.weight"].update(shape=[2, 3_000_000_000]),
    "a slice outside of the tensor": lambda m: a_slice(m).update(offsets=[1, 0]),
    "a slice twice": lambda m: m["tensors"]["model"]["embed.weight"].update(
        slices=2 * [a_slice(m) | {"shape": [1, 3]}]
    ),
    "no slice": lambda m: m["tensors"]["model"]["embed.weight"].update(slices=[]),
    "bytes of the header": lambda m: a_slice(m).update(begin=0),
    "bytes behind the end": lambda m: a_slice(m).update(begin=1 << 40),
    "an unknown type": lambda m: m["tensors"]["model"]["embed.weight"].update(dtype="PICKLE"),
    "a missing field": lambda m: a_slice(m).pop("crc32"),
    "a list for a file": lambda m: m["files"].update({"state.json": [1]}),
    "no state": lambda m: m["files"].pop("state.json"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_manifest_that_makes_no_sense_is_rejected_before_anything_is_allocated(tmp_path, forgery):
    checkpointer = Checkpointer(tmp_path, keep=2)
    for step in (3, 4):
        checkpointer.save(step, tensors_of(step), {}, wait=True)
    forged(tmp_path / "checkpoint-4", lambda manifest: None)
    loaded = load_latest(tmp_path)
    assert loaded is not None and loaded.step == 4
    forged(tmp_path / "checkpoint-4", FORGERIES[forgery])
    loaded = load_latest(tmp_path)
    assert loaded is not None and loaded.step == 3
    assert loaded.rejected[0].startswith("checkpoint-4: manifest.json: "), loaded.rejected


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


class HeldBack(Staging):
    """Copies when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.let = threading.Event()

    def copy(self, pieces, ready):
        assert self.let.wait(20)
        return super().copy(pieces, ready)


def test_with_overlap_save_returns_at_once_and_the_optimizer_waits_for_the_copy(tmp_path):
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = torch.ones(3)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    staging, seen = HeldBack(), []
    checkpointer = Checkpointer(tmp_path, keep=1, staging=staging)
    checkpointer.overlap(optimizer)
    checkpointer.save(1, {"model": {"w": weight}}, {})

    def let() -> None:
        seen.append(weight.tolist())
        staging.let.set()

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
    assert disk.operations == written + 1, "the folder was synced, nothing written"
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
