"""The format on disk, as bytes: safetensors headers and sealed manifests. Format 2, here of two ranks:

    checkpoint-20/
      model-00001-of-00002.safetensors      what rank 0 holds of a group of tensors; its header is the public
      model-00002-of-00002.safetensors      safetensors format's. One rank writes `model.safetensors`.
      optimizer-00001-of-00002.safetensors
      optimizer-00002-of-00002.safetensors
      rng-00001-of-00002.safetensors
      state.json                            everything that is no tensor
      manifest.json                         written last

    manifest.json
      {
      "format": 2,
      "step": 20,
      "files": {"model-00001-of-00002.safetensors": {"size": 120, "head": 104, "crc32": 41}, ...
                "state.json": {"size": 9, "head": 9, "crc32": 7}},
      "tensors": {"model": {"lm_head.weight": {"dtype": "F32", "shape": [4, 2], "slices": [
          {"file": "model-00001-of-00002.safetensors", "begin": 104, "offsets": [0, 0], "shape": [2, 2], "crc32": 99},
          {"file": "model-00002-of-00002.safetensors", "begin": 104, "offsets": [2, 0], "shape": [2, 2], "crc32": 98}
      ]}}},
       "crc32": "89abcdef"
      }

A tensor is the union of its slices, whoever wrote them: `offsets` says where in the whole tensor a slice begins,
`begin` where in its file. A file's `crc32` is of its first `head` bytes, a slice's of the slice, the manifest's own of
all bytes before it: every byte stands under exactly one checksum, so each flipped bit is noticed.

Must not know how files are written or read. `index.py` has the same as types.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from burnish.model.tensor_bytes import DTYPE_NAMES

FORMAT = 2
MANIFEST = "manifest.json"
STATE = "state.json"


class Corrupt(Exception):
    """This checkpoint cannot be trusted; the message names the file and the tensor. Met by `load_latest` only."""


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
    """JSON, a line for every key; the last one is the checksum of all bytes before it."""
    # Without `indent`: json's indented form is written in Python, 20 times slower, and holds the interpreter's lock.
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in manifest.items())
    head = b"{\n" + ",\n".join(lines).encode()
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
