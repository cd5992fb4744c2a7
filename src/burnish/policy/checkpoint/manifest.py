"""The format on disk: names, manifest and safetensors header, as bytes. Format 1:

    checkpoint-20/
      model.safetensors      one file for every group of tensors; the header is the public safetensors format's
      optimizer.safetensors
      rng.safetensors
      state.json             everything that is no tensor
      manifest.json          written last

    manifest.json
      {"format": 1, "step": 20,
       "files": {"model.safetensors": {"size": 136, "header_size": 104, "header_crc32": 41},
                 "state.json": {"size": 9, "crc32": 7}},
       "tensors": {"model": {"lm_head.weight": {"dtype": "F32", "shape": [4, 2], "slices": [
           {"file": "model.safetensors", "offsets": [0, 0], "shape": [4, 2], "crc32": 99}]}}},
       "crc32": "89abcdef"}

A tensor is the union of its slices: `offsets` says where in the whole tensor a slice begins. One process writes one
slice a tensor; several will write `model-00001-of-00002.safetensors` and the reader need not change. Every byte of
every file stands under exactly one checksum, the manifest's under its own last line, so each flipped bit is noticed.

Must not know how files are written or read.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"

# https://huggingface.co/docs/safetensors: the format's names for element types.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Corrupt(Exception):
    """This checkpoint cannot be trusted; the message names the file and the tensor. Met by `load_latest` only."""


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the finished checkpoint of a step lies. A writer's and a deleter's names have a suffix behind it."""
    return run_dir / f"checkpoint-{step}"


def step_of(name: str) -> int | None:
    """20 for `checkpoint-20`; None for all else, `checkpoint-20.tmp-1f3a` included."""
    found = re.fullmatch(r"checkpoint-(0|[1-9][0-9]*)", name)
    return int(found[1]) if found else None


def is_leftover(name: str) -> bool:
    """A save or a deletion that was cut short."""
    return re.fullmatch(r"checkpoint-[0-9]+\.(tmp|trash)-[0-9a-f]+", name) is not None


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any dtype and shape, shared, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def encode_header(tensors: Mapping[str, Tensor]) -> tuple[bytes, list[str]]:
    """A safetensors header, and the order in which the tensors' bytes follow it.

    Wide elements first and a header padded to a multiple of 8 bytes: every tensor is then aligned in the file.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in order:
        tensor = tensors[name]
        end = begin + tensor.nbytes
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def decode_header(header: bytes | bytearray) -> dict[str, tuple[int, int]]:
    """tensor name -> (first byte in the file, number of bytes)."""
    entries = json.loads(header[8:])
    entries.pop("__metadata__", None)
    return {
        name: (len(header) + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in entries.items()
    }


def encode_manifest(manifest: dict[str, Any]) -> bytes:
    """JSON whose last key is the checksum of all bytes before it."""
    head = json.dumps(manifest, indent=1).encode().removesuffix(b"\n}")
    return head + _seal(head)


def decode_manifest(raw: bytes | bytearray) -> dict[str, Any]:
    """Raises:
    Corrupt: a bit differs from what was written.
    """
    head = raw[: -len(_seal(b""))]
    if raw != head + _seal(head):
        raise Corrupt(f"{MANIFEST}: checksum differs")
    return json.loads(raw)


def _seal(head: bytes | bytearray) -> bytes:
    return b',\n "crc32": "%08x"\n}\n' % zlib.crc32(head)
