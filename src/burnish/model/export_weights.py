"""Weights into a folder's safetensors files, one tensor in memory at a time, by one rank or by many.

Every rank gathers the same tensors in the same order; rank 0 writes. Which file a tensor goes to, and where in it, is
known before any is gathered: transformers' own conversions (it undoes what its loader did: fused experts become one
tensor an expert) are run over deferred tensors, and a safetensors file names the place of all its tensors in front.
Must not know what a model is exported for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from burnish.errors import RunFailed
from burnish.model.deferred import deferred, sources, values
from burnish.model.load import quiet
from burnish.model.weight_files import WeightFiles

if TYPE_CHECKING:
    from burnish.mesh import Mesh
    from burnish.model.policy_model import PolicyModel
    from burnish.model.shards import Whole
    from burnish.region import Region

MAX_FILE_BYTES = 50 * 10**9
"""As transformers' `save_pretrained`."""
_ORDER = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")
"""safetensors' names of what a tensor holds; in a file those of the last ones come first, so that each is aligned."""
_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}

Files = Mapping[str, Mapping[str, Tensor]]
"""File name -> name -> deferred tensor."""


def computing_dtype(model: PolicyModel) -> torch.dtype:
    """What the model computes in; float32 masters of trained parameters are rounded to it, as they are in training."""
    return model.hf_config.dtype or torch.float32


def is_first(model: PolicyModel) -> bool:
    """Whether this rank writes what there is one of."""
    return model.mesh is None or model.mesh.rank == 0


def free_bytes(device: torch.device) -> int:
    """Memory that is free where this process computes: of the GPU, or of this machine and its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not Path("/proc/meminfo").exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    limit = (group / "memory.max").read_text().strip() if (group / "memory.max").exists() else "max"
    return free if limit == "max" else min(free, int(limit) - int((group / "memory.current").read_text()))


def save_weights(
    model: PolicyModel,
    kind: Any,
    config: Any,
    tensors: Mapping[str, Whole],
    to: Path,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """`tensors` as the folder of a transformers class: the bytes that its `save_pretrained` would write.

    An empty model of that class says how: it has the sizes of the file, no adapter and no padding.

    Raises:
        RunFailed: rank 0 could not write; it raises the OSError itself.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    held: dict[str, Tensor] = {}
    shell, planned = plan_files(model, kind, config, tensors, held)
    split = split_state_dict_into_shards_factory(
        planned,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_file_bytes,
    )
    if is_first(model):
        with quiet():
            shell.save_pretrained(to, state_dict={})  # what stands beside the weights, around no weights
        (to / "model.safetensors").unlink(missing_ok=True)
        if split.is_sharded:
            metadata = {"total_parameters": shell.num_parameters(), **split.metadata}
            index = json.dumps({"metadata": metadata, "weight_map": split.tensor_to_filename}, indent=2, sort_keys=True)
            (to / "model.safetensors.index.json").write_text(f"{index}\n")
    files = {file: {name: planned[name] for name in names} for file, names in split.filename_to_tensors.items()}
    _stream(files, tensors, held, to, model.mesh)


def plan_files(
    model: PolicyModel, kind: Any, config: Any, tensors: Mapping[str, Whole], held: Mapping[str, Tensor]
) -> tuple[Any, dict[str, Tensor]]:
    """(an empty model of a transformers class, what `save_pretrained` of a full one would write under which names):
    the latter deferred, made of what `held` has of `tensors` at the time."""
    from transformers.core_model_loading import revert_weight_conversion

    dtype = computing_dtype(model)
    with torch.device("meta"):
        shell = kind._from_config(config, dtype=dtype, attn_implementation="eager")
    conversions = getattr(model.causal_lm, "_weight_conversions", None)
    if conversions is not None:
        shell._weight_conversions = conversions
    unsaved = set(shell._keys_to_ignore_on_save or ())
    # No buffer is rounded: it does not train, and `e_score_correction_bias` is float32 in every bfloat16 model.
    kept = {name for name, _ in shell.named_buffers()}
    leaves = {
        name: tensor if name in kept else _cast(tensor, dtype)
        for name, tensor in _leaves(tensors, held).items()
        if name not in unsaved
    }
    return shell, revert_weight_conversion(shell, leaves)


def save_tensors(tensors: Mapping[str, Whole], file: Path, mesh: Mesh | None) -> None:
    """`tensors` as they are, in one file. Raises as `save_weights`."""
    held: dict[str, Tensor] = {}
    _stream({file.name: _leaves(tensors, held)}, tensors, held, file.parent, mesh)


def differing(model: PolicyModel, tensors: Mapping[str, Whole], written: Mapping[str, Tensor] | None) -> list[str]:
    """Names of tensors that are not, bit for bit, what was written; one in memory at a time. The same on every rank.

    Args:
        written: deferred, under the names of `tensors`, as `read_folder` and `WeightFiles` give them; on rank 0 alone.
    """
    wrong = []
    for name, tensor in tensors.items():
        made = tensor.make()
        if written is not None:
            found = values(written[name]) if name in written else None
            if found is None or not torch.equal(found, made.to(found.dtype).cpu()):
                wrong.append(name)
    return wrong if model.mesh is None else model.mesh.from_first(wrong)


def read_folder(folder: Path, kind: Any) -> dict[str, Tensor]:
    """What transformers' class `kind` would load from a written folder, by parameter name, deferred.

    Raises:
        RunFailed: it would not find all of its weights there.
    """
    files = WeightFiles([str(file) for file in sorted(folder.glob("model*.safetensors"))])
    found, lost = as_loaded(kind, kind.config_class.from_pretrained(folder), files.tensors)
    if lost:
        raise RunFailed(f"{folder}: the export has no {lost[0]}, or one of another shape")
    return found


def as_loaded(kind: Any, config: Any, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(what transformers' class `kind` makes of the tensors of files, by parameter name, deferred; names of those that
    it lacks or that have another shape)."""
    with quiet():
        loaded, found = kind.from_pretrained(
            None, config=config, state_dict=dict(tensors), dtype="auto", output_loading_info=True
        )
    lost = sorted(found["missing_keys"] | {name for name, *_ in found["mismatched_keys"]})
    return dict(loaded.named_parameters(remove_duplicate=False)) | dict(loaded.named_buffers()), lost


def _leaves(tensors: Mapping[str, Whole], held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor deferred, its values those that `held` has under its name at the time."""

    def leaf(name: str, tensor: Whole) -> Tensor:
        def read(region: Region) -> Tensor:
            return held[name][region.slices()]

        return deferred(read, tensor.shape, tensor.dtype, source=name)

    return {name: leaf(name, tensor) for name, tensor in tensors.items()}


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _stream(files: Files, tensors: Mapping[str, Whole], held: dict[str, Tensor], to: Path, mesh: Mesh | None) -> None:
    """Gathers each of `tensors`, and writes what can be made of those that `held` then has."""
    first = mesh is None or mesh.rank == 0
    file_of = {name: file for file, names in files.items() for name in names}
    planned = {name: tensor for names in files.values() for name, tensor in names.items()}
    open_files: dict[str, _File] = {}
    error: OSError | None = None
    try:
        for name, tensor in made(planned, tensors, held, first=first):
            if error is not None:  # others wait in the next gathering
                continue
            file = file_of[name]
            try:
                if file not in open_files:
                    open_files[file] = _File(to / file, files[file])
                open_files[file].write(name, tensor)
            except OSError as failed:
                error = failed
    finally:
        for file in open_files.values():
            file.close()
    _agree(error, mesh)


def made(
    planned: Mapping[str, Tensor], tensors: Mapping[str, Whole], held: dict[str, Tensor], *, first: bool
) -> Iterator[tuple[str, Tensor]]:
    """Gathers each of `tensors` into `held`, and yields what can be made of those that it then has, on the CPU, until
    all of `planned` is. Every rank takes part; on those that are not `first` there is nothing to yield."""
    left = {name: set(sources(tensor)) for name, tensor in planned.items()}
    users: dict[str, list[str]] = {}
    for name, needed in left.items():
        for source in needed:
            users.setdefault(source, []).append(name)
    for source in (source for source in tensors if source in users):
        whole = tensors[source].make()
        if not first:
            continue
        held[source] = whole.cpu()
        for name in [name for name in users[source] if left[name] <= held.keys()]:
            yield name, values(planned[name])
            del left[name]
        for done in [source for source in held if not any(name in left for name in users[source])]:
            del held[done]
    assert not (first and left), f"not made: {list(left)[:4]}"


def _agree(error: OSError | None, mesh: Mesh | None) -> None:
    """Raises on every rank if rank 0 could not write."""
    said = str(error) if error is not None else None
    said = said if mesh is None else mesh.from_first(said)
    if error is not None:
        raise error
    if said is not None:
        raise RunFailed(f"rank 0 could not write the export: {said}")


class _File:
    """A safetensors file whose tensors are written in any order."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._begins: dict[str, int] = {}
        end = 0
        for name in sorted(tensors, key=lambda n: (-_ORDER.index(_NAMES[tensors[n].dtype]), n)):
            tensor = tensors[name]
            begin, end = end, end + tensor.nbytes
            self._begins[name] = begin
            header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._start = 8 + len(encoded)
        self._file: BinaryIO = path.open("wb")
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)
        self._file.truncate(self._start + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """The values of one of the tensors, to its place."""
        self._file.seek(self._start + self._begins[name])
        raw: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        self._file.write(raw)

    def close(self) -> None:
        self._file.close()
