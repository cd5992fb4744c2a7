"""A pickle that runs code, wherever it lies in a checkpoint's folder, is never executed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os, pickle, shutil, sys, zipfile
from pathlib import Path
import torch
from burnish.policy.checkpoint import Checkpointer, LocalPlace, load_latest
from burnish.policy.checkpoint.manifest import Corrupt, encode_manifest
from burnish.policy.checkpoint.reader import verify
from tests.checkpoint_helpers import assert_is_step, tensors_of

run, harm = Path(sys.argv[1]) / "run", Path(sys.argv[1]) / "harm"
run.mkdir()

class Payload:
    def __reduce__(self):
        return os.mkdir, (str(harm),)

def payloads():
    for protocol in (0, 2, 4):
        yield pickle.dumps(Payload(), protocol)
    torch.save({"weight": torch.ones(2), "hostile": Payload()}, run.parent / "saved.pt")
    yield (run.parent / "saved.pt").read_bytes()
    legacy = run.parent / "legacy.pt"
    torch.save(Payload(), legacy, _use_new_zipfile_serialization=False)
    yield legacy.read_bytes()

hostile = list(payloads())
for step in (10, 20):
    Checkpointer(run, keep=2).save(step, tensors_of(step), {}, wait=True)
own = sorted(path.name for path in (run / "checkpoint-20").iterdir())
good = {name: (run / "checkpoint-20" / name).read_bytes() for name in own}

unpickled, facts = [], {"beside": 0, "instead": 0}
sys.addaudithook(lambda event, arguments: unpickled.append(arguments) if event == "pickle.find_class" else None)

def read(step, rejected):
    loaded = Checkpointer(run, keep=2).load_latest()
    assert (loaded.step, len(loaded.rejected)) == (step, rejected), loaded.rejected
    assert_is_step(loaded.tensors, step)
    try:
        verify(LocalPlace(run), 20)
        assert rejected == 0
    except Corrupt:
        assert rejected == 1

strangers = ["data.pkl", ".metadata", "model.bin", "pytorch_model.bin", "optimizer.pt", "rng_state.pth",
             "scheduler.pkl", "__0_0.distcp", "model-00002-of-00002.safetensors", "training_args.bin",
             "manifest.pkl", "__init__.py"]
for payload in hostile:
    for name in strangers:
        for folder in (run, run / "checkpoint-20"):
            (folder / name).write_bytes(payload)
            read(20, 0)
            (folder / name).unlink()
            facts["beside"] += 1
    for name in own:
        path = run / "checkpoint-20" / name
        for content in (payload, good[name][: len(good[name]) // 2] + payload):
            path.write_bytes(content)
            read(10, 1)
            facts["instead"] += 1
        path.write_bytes(good[name])

# A manifest forged to fit: the pickle is the weight, every checksum is right. It is read, as numbers.
import zlib
payload = hostile[1] + bytes(-len(hostile[1]) % 4)
path = run / "checkpoint-20" / "data.pkl"
path.write_bytes(payload)
manifest = json.loads(good["manifest.json"])
del manifest["crc32"]
manifest["files"]["data.pkl"] = {"size": len(payload), "head": 0, "crc32": 0}
part = {"file": "data.pkl", "begin": 0, "offsets": [0], "shape": [len(payload)], "crc32": zlib.crc32(payload)}
manifest["tensors"]["model"]["hostile"] = {"dtype": "U8", "shape": [len(payload)], "slices": [part]}
(run / "checkpoint-20" / "manifest.json").write_bytes(encode_manifest(manifest))
loaded = load_latest(run)
assert loaded.step == 20 and bytes(loaded.tensors["model"]["hostile"].numpy()) == payload
path.unlink()
(run / "checkpoint-20" / "manifest.json").write_bytes(good["manifest.json"])

# The next save and its deletions do not look into them either.
for name in ("data.pkl", ".metadata"):
    (run / "checkpoint-10" / name).write_bytes(hostile[0])
Checkpointer(run, keep=1).save(30, tensors_of(30), {}, wait=True)
facts |= {"left": sorted(os.listdir(run)), "unpickled": len(unpickled), "harm": harm.exists()}

# The payloads do work, and the hook does see them.
facts["control"] = []
for payload in hostile[:3]:
    pickle.loads(payload)
    facts["control"].append(harm.exists())
    harm.rmdir()
try:
    torch.load(run.parent / "saved.pt", weights_only=False)
finally:
    facts["control"].append(harm.exists())
facts["control_unpickled"] = len(unpickled)
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path_factory.mktemp("pickles"))]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], check=True, timeout=100, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def test_no_pickle_is_executed_or_even_opened_as_one(facts):
    assert facts["beside"] == 120 and facts["instead"] == 40
    assert facts["unpickled"] == 0 and not facts["harm"]
    assert facts["left"] == ["checkpoint-30"]


def test_the_payloads_would_have_done_harm(facts):
    assert facts["control"] == [True, True, True, True] and facts["control_unpickled"] >= 4
