"""A model's safetensors files: which they are, and every tensor in them as a deferred one.

Opening reads the headers alone. A region is read when it is asked for, through one mapping at a time: pages of a mapped
file that were read count as this process's memory until it is unmapped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from burnish.model.deferred import deferred

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.region import Region

REMAP_BYTES = 32 * 2**20
"""What may be read of a file before it is mapped anew: enough that opening costs little (a header of 10,000 tensors
takes 10 ms), little beside a shard."""


def find_weight_files(located: Mapping[str, Any]) -> list[str] | None:
    """The paths of the files that transformers would read, fetched from the hub where they are not cached.

    Args:
        located: what `load.locate` returned.

    Returns None where they are of another format (GGUF, pickles), or only an adapter's.

    Raises:
        OSError: the index names a file that is not there.
    """
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    if "gguf_file" in located:
        return None
    name = located["pretrained_model_name_or_path"]
    options: dict[str, Any] = {k: located[k] for k in ("revision", "local_files_only") if k in located}

    def find(file: str) -> str | None:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False, **options)

    if find("adapter_config.json") is not None:
        return None
    if (single := find("model.safetensors")) is not None:
        return [single]
    if (index := find("model.safetensors.index.json")) is not None:
        return get_checkpoint_shard_files(name, index, **options)[0]
    return None


class WeightFiles:
    """Every tensor of some safetensors files.

    Raises:
        SafetensorError: a file is cut short, or is none.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self._open: tuple[str, Any, int] = ("", None, 0)
        self.tensors: dict[str, Tensor] = {}
        """By their names in the files, deferred; of two with one name the last, as transformers reads it."""
        for file in files:
            handle = self._mapped(file, 0)
            names = handle.keys()
            for name in names:
                entry = handle.get_slice(name)
                shape = entry.get_shape()
                dtype = (entry[0:0] if shape else entry[...]).dtype
                self.tensors[name] = deferred(partial(self._read, file, name), shape, dtype)

    def _read(self, file: str, name: str, region: Region) -> Tensor:
        entry = self._mapped(file, region.numel * 8).get_slice(name)
        return entry[region.slices() or ...].clone()

    def _mapped(self, file: str, num_bytes: int) -> Any:
        from safetensors import safe_open

        path, handle, read = self._open
        if path != file or read >= REMAP_BYTES:
            self._open = ("", None, 0)  # unmapped before the next is mapped
            handle, read = safe_open(file, framework="pt"), 0
        self._open = (file, handle, read + num_bytes)
        return handle
