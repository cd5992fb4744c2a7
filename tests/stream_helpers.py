"""Sources and a renderer small enough to be checked by eye: a row says how long its document is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from burnish.data.config import DataConfig
from burnish.data.sources.base import RowShards, RowTable, Source
from burnish.errors import DataError
from burnish.types import Block, Group, Rendered, Row, Sample

BAD_JSON = -1
REFUSED = -2


class ListTable:
    def __init__(self, lengths: Sequence[int], name: str) -> None:
        self._lengths, self._name = lengths, name

    def __len__(self) -> int:
        return len(self._lengths)

    def rows(self, indices: Sequence[int]) -> list[Row]:
        return [row(self._lengths[index], f"{self._name}:{index}") for index in indices]


class ListShards:
    def __init__(self, shards: Sequence[Sequence[int]], name: str) -> None:
        self._shards, self._name = shards, name
        self.num_shards = len(shards)

    def read(self, shard: int, start: int) -> Iterator[Row]:
        for index in range(start, len(self._shards[shard])):
            yield row(self._shards[shard][index], f"{self._name}{shard}:{index}")


def row(length: int, where: str) -> Row:
    if length == BAD_JSON:
        raise DataError("the row is not JSON", where=where)
    return Row({"length": length}, where)


class Lengths(Source):
    """A table: row i is a document of `lengths[i]` tokens."""

    type: str = "tests.stream_helpers:Lengths"
    lengths: tuple[int, ...]
    name: str = "a"

    def open(self) -> RowTable:
        return ListTable(self.lengths, self.name)


class ShardLengths(Source):
    """Shards: row i of shard s is a document of `shards[s][i]` tokens."""

    type: str = "tests.stream_helpers:ShardLengths"
    shards: tuple[tuple[int, ...], ...]
    name: str = "s"

    def open(self) -> RowShards:
        return ListShards(self.shards, self.name)


class LengthRenderer:
    """A document of n tokens: ids n, n + 1, ..., all trained but the first, and the weight 1 / n."""

    chat_template: str | None = None

    def __init__(self) -> None:
        self.rendered = 0
        """Rows so far."""

    def render(self, rows: Sequence[Row]) -> list[Rendered]:
        self.rendered += len(rows)
        return [self._one(row) for row in rows]

    def _one(self, row: Row) -> Rendered:
        length = row.record["length"]
        if length == REFUSED:
            return Rendered(row, None, Counter(), DataError("nothing to train", where=row.where))
        mask = np.arange(length) > 0
        columns = {"weight": np.array(1 / length, np.float32), "twice": 2 * np.arange(length, dtype=np.float32)}
        sample = Sample(np.arange(length, 2 * length, dtype=np.int32), mask, row.where, columns)
        return Rendered(row, Group((sample,)), Counter(trained=length - 1, masked=1))


def data_config(*train: Source, **fields: Any) -> DataConfig:
    settings: dict[str, Any] = {"max_length": 32, "over_length": "drop", "prefetch": 3}
    packing = {"type": "best_fit", "lanes": 4} | fields.pop("packing", {"open_bins": 2})
    return DataConfig.model_validate({"train": list(train), "packing": packing} | settings | fields)


def same(a: Block, b: Block) -> bool:
    """Equal to the last bit and name."""
    tensors = ("token_ids", "loss_mask", "position_ids", "document_ids", "documents", "group_ids")
    return (
        a.sample_ids == b.sample_ids
        and all(getattr(a, name).equal(getattr(b, name)) for name in tensors)
        and a.columns.keys() == b.columns.keys()
        and all(a.columns[name].equal(b.columns[name]) for name in a.columns)
    )
