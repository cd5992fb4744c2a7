"""Parquet files and Hugging Face sets, with real files of both."""

from __future__ import annotations

from datetime import date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from burnish.data.sources._files import DataFile
from burnish.data.sources.base import RowShards, RowTable
from burnish.data.sources.huggingface import HuggingFace
from burnish.data.sources.parquet import Parquet, ParquetTable, plain
from burnish.errors import DataError
from burnish.types import Row


def numbers(start: int, stop: int) -> list[dict[str, Any]]:
    return [{"n": n, "text": f"t{n}"} for n in range(start, stop)]


def write(path: Path, records: list[dict[str, Any]], row_group_size: int = 4) -> str:
    pq.write_table(
        pa.Table.from_pylist(records, None if records else pa.schema([("n", pa.int64())])), path, row_group_size
    )
    return str(path)


def opened_table(source: Parquet | HuggingFace) -> RowTable:
    opened = source.open()
    assert not isinstance(opened, RowShards)
    return opened


def opened_shards(source: Parquet | HuggingFace) -> RowShards:
    opened = source.open()
    assert isinstance(opened, RowShards)
    return opened


def refused(source: Parquet | HuggingFace) -> DataError:
    with pytest.raises(DataError) as caught:
        source.open()
    return caught.value


def test_parquet_rows_in_any_order_over_groups_and_files(tmp_path: Path):
    write(tmp_path / "b.parquet", numbers(10, 13))
    write(tmp_path / "a.parquet", numbers(0, 10))
    write(tmp_path / "c.parquet", [])
    rows = opened_table(Parquet(path=str(tmp_path)))
    assert len(rows) == 13
    assert rows.rows([12, 0, 9, 4, 9]) == [
        Row({"n": 12, "text": "t12"}, f"{tmp_path}/b.parquet:row 2"),
        Row({"n": 0, "text": "t0"}, f"{tmp_path}/a.parquet:row 0"),
        Row({"n": 9, "text": "t9"}, f"{tmp_path}/a.parquet:row 9"),
        Row({"n": 4, "text": "t4"}, f"{tmp_path}/a.parquet:row 4"),
        Row({"n": 9, "text": "t9"}, f"{tmp_path}/a.parquet:row 9"),
    ]


def test_parquet_keeps_few_row_groups(tmp_path: Path):
    path = write(tmp_path / "a.parquet", numbers(0, 20))
    decoded_bytes = pq.ParquetFile(path).read_row_group(4).nbytes
    rows = ParquetTable([DataFile(path)], dict, cache_bytes=3 * decoded_bytes)
    rows.rows([0, 5, 9])
    assert list(rows._decoded) == [0, 1, 2]
    rows.rows([1])
    assert rows.rows([13])[0].record["n"] == 13
    assert list(rows._decoded) == [2, 0, 3], "the group that was used longest ago is dropped first"
    tight = ParquetTable([DataFile(path)], dict, cache_bytes=1)
    assert [row.record["n"] for row in tight.rows(range(20))] == list(range(20))
    assert list(tight._decoded) == [4]


def test_parquet_streams_the_same_rows_from_any_start(tmp_path: Path):
    path = write(tmp_path / "a.parquet", numbers(0, 900), row_group_size=400)
    whole = opened_table(Parquet(path=path)).rows(range(900))
    stream = opened_shards(Parquet(path=path, streaming=True))
    assert stream.num_shards == 1
    for start in (0, 1, 255, 256, 399, 400, 401, 700, 899, 900, 950):
        assert list(stream.read(0, start)) == whole[start:], start


def test_parquet_over_fsspec(tmp_path: Path):
    import fsspec

    local = write(tmp_path / "a.parquet", numbers(0, 6))
    fsspec.filesystem("memory").pipe("/parquet-test/a.parquet", Path(local).read_bytes())
    rows = opened_table(Parquet(path="memory://parquet-test/a.parquet", columns={"text": "said"}))
    assert rows.rows([5]) == [Row({"n": 5, "said": "t5"}, "memory:///parquet-test/a.parquet:row 5")]


def test_nulls_that_arrow_adds_are_dropped(tmp_path: Path):
    user = {"role": "user", "content": "hi"}
    records = [
        {"messages": [user, {"role": "assistant", "tool_calls": [{"name": "f"}]}], "tools": "[]"},
        {"messages": [user, {"role": "assistant", "content": "ho"}]},
    ]
    path = write(tmp_path / "a.parquet", records)
    assert [row.record for row in opened_table(Parquet(path=path)).rows([0, 1])] == records
    assert [row.record for row in opened_shards(Parquet(path=path, streaming=True)).read(0, 0)] == records
    assert plain([None, {"a": None, "b": [{"c": None}]}]) == [None, {"b": [{}]}]


def test_dates_become_text(tmp_path: Path):
    turn = {"at": datetime(2025, 1, 2, 3, 4, 5), "on": date(2025, 1, 2), "n": 1}
    path = write(tmp_path / "a.parquet", [{"turn": turn}])
    expected = {"turn": {"at": "2025-01-02 03:04:05", "on": "2025-01-02", "n": 1}}
    assert opened_table(Parquet(path=path)).rows([0])[0].record == expected


def test_parquet_refusals(tmp_path: Path):
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all, but long enough")
    error = refused(Parquet(path=f"{tmp_path}/a.parquet"))
    assert error.where == f"{tmp_path}/a.parquet"
    assert "cannot be read as Parquet: Parquet magic bytes not found" in error.reason
    empty = write(tmp_path / "nothing.parquet", [])
    for streaming in (False, True):
        error = refused(Parquet(path=empty, streaming=streaming))
        assert (error.where, error.reason) == (empty, "holds no row")
    assert f"{tmp_path}/a.parquet" in refused(Parquet(path=f"{tmp_path}/b.parquet")).cure


def test_a_damaged_page_is_named_when_it_is_read(tmp_path: Path):
    path = Path(write(tmp_path / "a.parquet", [{"text": "x" * 50 + str(n)} for n in range(100)], row_group_size=100))
    damaged = bytearray(path.read_bytes())
    damaged[4:200] = b"\xff" * 196
    path.write_bytes(damaged)
    rows = opened_table(Parquet(path=str(path)))
    with pytest.raises(DataError, match="cannot be read as Parquet") as caught:
        rows.rows([0])
    assert caught.value.where == str(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one`: a set in 2 files; `two`: a dictionary of sets with splits train and test."""
    import datasets

    folder = tmp_path_factory.mktemp("saved")
    one = datasets.Dataset.from_list(numbers(0, 10))
    one.save_to_disk(str(folder / "one"), num_shards=2)
    splits = {"train": one, "test": datasets.Dataset.from_list(numbers(10, 12))}
    datasets.DatasetDict(splits).save_to_disk(str(folder / "two"))
    datasets.Dataset.from_dict({"text": []}).save_to_disk(str(folder / "empty"))
    return folder


def test_a_saved_set(saved: Path):
    rows = opened_table(HuggingFace(path=str(saved / "one")))
    assert len(rows) == 10
    assert rows.rows([9, 0]) == [
        Row({"n": 9, "text": "t9"}, f"{saved}/one:train:row 9"),
        Row({"n": 0, "text": "t0"}, f"{saved}/one:train:row 0"),
    ]
    test = opened_table(HuggingFace(path=str(saved / "two"), split="test", columns={"text": "said"}))
    assert [row.record for row in test.rows([1, 0])] == [{"n": 11, "said": "t11"}, {"n": 10, "said": "t10"}]


def test_a_saved_set_streams_by_its_files(saved: Path):
    stream = opened_shards(HuggingFace(path=str(saved / "one"), streaming=True))
    assert stream.num_shards == 2
    assert [[row.record["n"] for row in stream.read(shard, 0)] for shard in (0, 1)] == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
    ]
    assert list(stream.read(1, 3)) == [
        Row({"n": 8, "text": "t8"}, f"{saved}/one:train:shard 1:row 3"),
        Row({"n": 9, "text": "t9"}, f"{saved}/one:train:shard 1:row 4"),
    ]


def test_a_folder_of_data_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"n": 0, "tools": null}\n{"n": 1, "tools": null}\n')
    path = str(tmp_path / "set")
    assert "corresponds to no data" in refused(HuggingFace(path=path, split="train[:0]")).reason
    assert opened_table(HuggingFace(path=path)).rows([1]) == [Row({"n": 1}, f"{path}:train:row 1")]
    assert [row.record["n"] for row in opened_shards(HuggingFace(path=path, streaming=True)).read(0, 1)] == [1]


def test_huggingface_refusals(saved: Path, tmp_path: Path):
    error = refused(HuggingFace(path=str(saved / "two"), split="tets"))
    assert error.reason == "no split 'tets'; it has: train, test"
    error = refused(HuggingFace(path=str(saved / "empty")))
    assert error.where.startswith(f"{saved}/empty")
    assert error.reason == "holds no row"
    (tmp_path / "nothing").mkdir()
    error = refused(HuggingFace(path=str(tmp_path / "nothing")))
    assert error.where == str(tmp_path / "nothing")
    assert "cannot load the set" in error.reason


def test_an_unreachable_hub_is_refused_at_once(monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    from burnish.hub import reachable

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    reachable.cache_clear()
    try:
        error = refused(HuggingFace(path="nobody/no-such-set"))
    finally:
        reachable.cache_clear()
    assert error.where == "nobody/no-such-set"
    assert error.reason == "no such folder, and the hub cannot be reached"
    assert "HF_HUB_OFFLINE=1" in error.cure
