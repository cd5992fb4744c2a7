"""What a second model said about every document of the data, once, kept on the disk: how it lies there, and how it is
read back. `answer_writer.py` writes it, `asking.py` asks.

    reference/                       or a teacher's cache
      answers-00000.safetensors      keys U8 [n, 16], ends I64 [n], and the columns of all trained tokens end to end:
      answers-00001.safetensors        ref_logprobs F32 [N], or teacher_topk_ids I32 [N, K], teacher_topk_logprobs F32
      manifest.json                  format, facts about who was asked, and each file's size and crc32; written last

An answer is found by the content of its document: a digest of its token ids, those of the prefix it shares, and its
loss mask. So it does not matter in which order, rows, ranks or epochs documents come, and a row that was edited is
missed instead of mistaken. Columns are stored at trained tokens alone, in the order of the document.

It must not know which model answered, nor recipes.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from burnish.errors import DataError
from burnish.policy.checkpoint.manifest import MANIFEST, Corrupt, decode_header, decode_manifest

if TYPE_CHECKING:
    from collections.abc import Set

    from burnish.losses.base import Loss
    from burnish.types import Block, Group

FORMAT = 1
KEY_BYTES = 16
STORED = {"teacher_topk_ids": torch.int32}
"""Columns whose type on the disk is not that in memory."""
LOADED = {"ref_logprobs": torch.float32, "teacher_topk_ids": torch.int64, "teacher_topk_logprobs": torch.float32}


def file_name(number: int) -> str:
    """Of one of a folder's files."""
    return f"answers-{number:05}.safetensors"


class Document(NamedTuple):
    """One document with trained tokens in a block."""

    number: int
    """Among those in use."""
    key: bytes
    trained: np.ndarray
    """int64 [n]: its trained tokens in the block."""


def key_of(prefix_ids: np.ndarray, token_ids: np.ndarray, loss_mask: np.ndarray) -> bytes:
    """A document's name: what the model reads, and which tokens are asked for."""
    digest = hashlib.blake2b(len(prefix_ids).to_bytes(8, "little"), digest_size=KEY_BYTES)
    for part, dtype in ((prefix_ids, "<i4"), (token_ids, "<i4"), (loss_mask, "?")):
        digest.update(np.ascontiguousarray(part, dtype).tobytes())
    return digest.digest()


def keys_of(group: Group) -> list[bytes]:
    """Of the documents with trained tokens in a rendered group."""
    nothing = np.zeros(0, np.int32)
    prefixes = [nothing if s.prefix is None else group.samples[s.prefix].token_ids for s in group.samples]
    return [
        key_of(prefix, sample.token_ids, sample.loss_mask)
        for prefix, sample in zip(prefixes, group.samples, strict=True)
        if sample.loss_mask.any()
    ]


def documents_of(block: Block) -> list[Document]:
    """The documents with trained tokens in a block."""
    token_ids, loss_mask, documents = (t.cpu().numpy() for t in (block.token_ids, block.loss_mask, block.documents))
    found = []
    used = documents[documents[:, 1] > documents[:, 0]]
    for number, (start, end, prefix_start, prefix_end) in enumerate(used):
        trained = start + np.flatnonzero(loss_mask[start:end])
        if len(trained):
            key = key_of(token_ids[prefix_start:prefix_end], token_ids[start:end], loss_mask[start:end])
            found.append(Document(number, key, trained))
    return found


class Answers:
    """Answers on the disk. See `second.Second`, and `open`."""

    obstacle = None

    def __init__(self, folder: Path, facts: Mapping[str, Any], cure: str) -> None:
        self.folder, self.facts, self._cure = folder, facts, cure
        self._columns: list[dict[str, Tensor]] = []
        keys, files, starts, ends = [], [], [], []
        for number, (name, written) in enumerate(facts["files"].items()):
            tensors = _read_file(folder / name, written, cure)
            file_ends = tensors.pop("ends").numpy()
            keys.append(tensors.pop("keys").numpy().view(f"S{KEY_BYTES}").reshape(-1))
            files.append(np.full(len(file_ends), number))
            starts.append(np.concatenate([[0], file_ends[:-1]]))
            ends.append(file_ends)
            self._columns.append(tensors)
        all_keys = np.concatenate(keys)
        order = np.argsort(all_keys, kind="stable")
        # 40 bytes a document: a dictionary would take 200.
        self._keys = all_keys[order]
        self._files, self._starts, self._ends = (np.concatenate(parts)[order] for parts in (files, starts, ends))

    @classmethod
    def open(cls, folder: Path, *, cure: str) -> Answers:
        """Reads every byte once to check it, and then only what is asked for.

        Raises:
            DataError: there is none, or a file is corrupt; `cure` says what to do then.
        """
        return cls(folder, read_manifest(folder, cure), cure)

    @staticmethod
    def are_of(folder: Path, of: Mapping[str, Any]) -> bool:
        """Whether `folder` holds the answers of whom these facts describe."""
        try:
            return read_manifest(folder, "")["of"] == json.loads(json.dumps(of))
        except DataError:
            return False

    def require(self, group: Group) -> None:
        """Raises DataError where one of a group's documents was not asked about."""
        for sample, key in zip((s for s in group.samples if s.loss_mask.any()), keys_of(group), strict=True):
            self._find(key, sample.sample_id)

    def set_temperature(self, temperature: float) -> None:
        assert temperature == 1.0, "what was kept was said at temperature 1"

    def annotate(self, blocks: list[Block], loss: Loss) -> list[Block]:
        """`blocks` with the columns that `loss` asks.

        Raises:
            DataError: a document was not asked about.
        """
        asks = loss.asks
        assert asks <= set(self.facts["columns"]), f"{self.folder} has no {sorted(asks - set(self.facts['columns']))}"
        return [self._annotated(block, asks) for block in blocks] if asks else blocks

    def reference(self, block: Block, loss: Loss) -> None:
        """None: a whole distribution is not kept."""
        assert loss.divergence is None, "a divergence asks for a whole distribution"

    def flops(self, blocks: list[Block], loss: Loss) -> float:
        """Nothing is computed."""
        return 0.0

    def _annotated(self, block: Block, asks: Set[str]) -> Block:
        columns = {}
        for name in sorted(asks):
            width, dtype = self.facts["columns"][name], LOADED[name]
            columns[name] = torch.zeros(block.num_tokens, *width, dtype=dtype)
        for document in documents_of(block):
            file, rows = self._find(document.key, block.sample_ids[document.number])
            for name, column in columns.items():
                column[torch.from_numpy(document.trained)] = self._columns[file][name][rows].to(column.dtype)
        device = block.token_ids.device
        return replace(block, columns=block.columns | {name: column.to(device) for name, column in columns.items()})

    def _find(self, key: bytes, sample_id: str) -> tuple[int, slice]:
        """(file, rows of its columns) of a document."""
        wanted = np.array(key, f"S{KEY_BYTES}")
        at = int(np.searchsorted(self._keys, wanted))
        if at == len(self._keys) or self._keys[at] != wanted:
            raise DataError(
                f"{self.folder} has no answer about this document: it was written for other data, or for another "
                f"max_length",
                where=sample_id,
                cure=self._cure,
            )
        return int(self._files[at]), slice(int(self._starts[at]), int(self._ends[at]))


def read_manifest(folder: Path, cure: str) -> dict[str, Any]:
    """What the writer said about the files of a folder.

    Raises:
        DataError: there is none, it is corrupt, or of another format.
    """
    try:
        facts = decode_manifest((folder / MANIFEST).read_bytes())
    except OSError as error:
        raise DataError(f"{MANIFEST} cannot be read: {error.strerror}", str(folder), cure) from error
    except (Corrupt, ValueError) as error:
        raise DataError(f"{MANIFEST} is corrupt", str(folder), cure) from error
    if "of" not in facts:
        raise DataError("is a manifest of something else, such as a checkpoint", str(folder / MANIFEST), cure)
    if facts["format"] != FORMAT:
        raise DataError(f"format {facts['format']}; this version of Burnish reads format {FORMAT}", str(folder), cure)
    return facts


def _read_file(path: Path, written: Mapping[str, int], cure: str) -> dict[str, Tensor]:
    """The tensors of a file, mapped, after one pass over its bytes: 2.5 GB/s on one core where they are cached."""
    try:
        data = np.memmap(path, np.uint8, mode="c")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read: {error}", str(path), cure) from error
    if len(data) != written["size"] or zlib.crc32(data) != written["crc32"]:  # pyright: ignore[reportArgumentType]
        raise DataError("is corrupt: its checksum differs from the manifest's", str(path), cure)
    size = 8 + int.from_bytes(data[:8].tobytes(), "little")
    described = json.loads(data[8:size].tobytes())
    tensors = {}
    for name, (begin, num_bytes) in decode_header(data[:size].tobytes()).items():
        dtype = {"U8": torch.uint8, "I32": torch.int32, "I64": torch.int64, "F32": torch.float32}[
            described[name]["dtype"]
        ]
        raw = torch.from_numpy(data[begin : begin + num_bytes])
        tensors[name] = raw.view(dtype).reshape(described[name]["shape"])
    return tensors
