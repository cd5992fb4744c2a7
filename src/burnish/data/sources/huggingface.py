"""Sets of the Hugging Face `datasets` library: from the hub, or from a folder that `save_to_disk` wrote."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from burnish.data.sources.base import RowShards, RowTable, Source
from burnish.data.sources.parquet import plain
from burnish.errors import DataError
from burnish.hub import reachable
from burnish.types import Row

if TYPE_CHECKING:
    import datasets


class HuggingFace(Source):
    """A set of the `datasets` library. Map-style by default; with `streaming` nothing is downloaded ahead and the set's
    own shards are read forwards."""

    type: Literal["huggingface"] = "huggingface"
    path: str
    """A hub id, or a folder: one that `save_to_disk` wrote, or one of data files."""
    name: str | None = None
    """The set's configuration, where it has several."""
    split: str = "train"
    """Also a part of one: `train[:10%]`."""
    revision: str | None = None
    """Commit hash, branch or tag on the hub."""
    streaming: bool = False
    """Read forwards only: rows are shuffled in windows, and progress has no known end."""

    def open(self) -> RowTable | RowShards:
        try:
            from datasets import IterableDataset
            from datasets.exceptions import DatasetsError
        except ImportError as error:
            cure = "pip install 'burnish[datasets]'"
            raise DataError("the package `datasets` is not installed", self.path, cure) from error
        try:
            loaded = self._load()
        except (OSError, ValueError, DatasetsError) as error:
            if isinstance(error, DataError):
                raise
            cure = "check path, name, split and revision; a private set needs `hf auth login`"
            raise DataError(f"cannot load the set: {error}", self.path, cure) from error
        where = f"{self.path}:{self.split}"
        if isinstance(loaded, IterableDataset):
            return HuggingFaceShards(loaded, where, self.renamed)
        if not len(loaded):
            raise DataError("holds no row", where)
        if self.streaming:
            files = min(len(loaded.cache_files) or 1, len(loaded))
            return HuggingFaceShards(loaded.to_iterable_dataset(num_shards=files), where, self.renamed)
        return HuggingFaceTable(loaded, where, self.renamed)

    def _load(self) -> datasets.Dataset | datasets.IterableDataset:
        import datasets
        from datasets import config

        folder = os.path.expanduser(self.path)
        if not os.path.isdir(folder):
            if not reachable() and not config.HF_HUB_OFFLINE:
                cure = "check path and network; with HF_HUB_OFFLINE=1 a copy downloaded before is used"
                raise DataError("no such folder, and the hub cannot be reached", self.path, cure)
            folder = self.path
        elif any(os.path.isfile(os.path.join(folder, name)) for name in ("dataset_dict.json", "state.json")):
            try:
                saved = datasets.load_from_disk(folder)
            except IndexError as error:  # what datasets 5 says of a saved set without a row
                raise DataError("holds no row", self.path) from error
            if isinstance(saved, datasets.Dataset):
                return saved
            if self.split not in saved:
                raise DataError(f"no split '{self.split}'; it has: {', '.join(map(str, saved))}", self.path)
            return saved[self.split]
        return datasets.load_dataset(
            folder, self.name, split=self.split, revision=self.revision, streaming=self.streaming
        )


class HuggingFaceTable:
    """Rows of a memory-mapped set."""

    def __init__(
        self, dataset: datasets.Dataset, where: str, renamed: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> None:
        self._dataset, self._where, self._renamed = dataset.with_format(None), where, renamed

    def __len__(self) -> int:
        return len(self._dataset)

    def rows(self, indices: Sequence[int]) -> list[Row]:
        """The rows of these numbers, in this order."""
        numbers = [int(index) for index in indices]
        columns = self._dataset[numbers]
        records = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        return [
            Row(self._renamed(plain(record)), f"{self._where}:row {number}")
            for number, record in zip(numbers, records, strict=True)
        ]


class HuggingFaceShards:
    """Shards of a set read forwards."""

    def __init__(
        self, dataset: datasets.IterableDataset, where: str, renamed: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> None:
        self._dataset, self._where, self._renamed = dataset, where, renamed
        self.num_shards = dataset.num_shards

    def read(self, shard: int, start: int) -> Iterator[Row]:
        """Rows of one shard from its row number `start` on; the rows before that are read and thrown away."""
        rows = self._dataset.shard(num_shards=self.num_shards, index=shard).skip(start)
        for number, record in enumerate(rows, start):
            yield Row(self._renamed(plain(record)), f"{self._where}:shard {shard}:row {number}")
