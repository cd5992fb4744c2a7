"""JSON lines: the index, random access, streaming, where files are found, and every refusal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from burnish.data.sources.base import RowShards, RowTable, Source
from burnish.data.sources.jsonl import JsonLines, JsonlShards, JsonlTable, index_lines
from burnish.errors import DataError
from burnish.types import Row


def write(path: Path, data: bytes | str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def table(source: Source) -> RowTable:
    opened = source.open()
    assert not isinstance(opened, RowShards)
    return opened


def shards(source: Source) -> RowShards:
    opened = source.open()
    assert isinstance(opened, RowShards)
    return opened


def refused(path: str, row: int = 0, streaming: bool = False) -> DataError:
    """The error of opening `path` or reading this row."""
    with pytest.raises(DataError) as caught:
        source = JsonLines(path=path, streaming=streaming)
        if streaming:
            list(shards(source).read(0, row))
        else:
            table(source).rows([row])
    return caught.value


INDEXED = [
    (b"", [0], []),
    (b"{}", [0, 2], [0]),
    (b"{}\n", [0, 3], [0]),
    (b"{}\n{}", [0, 3, 5], [0, 1]),
    (b"{}\r\n{}\r\n", [0, 4, 8], [0, 1]),
    (b"\n\n{}\n  \t\n {}\n\r\n", [0, 1, 2, 5, 9, 13, 15], [2, 4]),
    (b"   ", [0, 3], []),
]


@pytest.mark.parametrize(("text", "offsets", "lines"), INDEXED)
@pytest.mark.parametrize("piece", [1, 2, 3, 1 << 22])
def test_index_in_pieces_of_any_size(text: bytes, offsets: list[int], lines: list[int], piece: int):
    found_offsets, found_lines = index_lines(io.BytesIO(text), piece)
    assert found_offsets.dtype == np.int64
    assert found_offsets.tolist() == offsets
    assert list(found_lines) == lines


def test_rows_in_any_order_with_their_lines(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", '{"n": 0}\r\n\n{"n": "\u00e4\\n"}\n   \n{"n": 2}')
    rows = table(JsonLines(path=path))
    assert len(rows) == 3
    assert rows.rows([2, 0, 1, 0]) == [
        Row({"n": 2}, f"{path}:5"),
        Row({"n": 0}, f"{path}:1"),
        Row({"n": "\u00e4\n"}, f"{path}:3"),
        Row({"n": 0}, f"{path}:1"),
    ]
    assert rows.rows([]) == []


def test_streaming_gives_the_same_rows_from_any_start(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", '\n{"n": 0}\n\n{"n": 1}\r\n{"n": 2}')
    whole = table(JsonLines(path=path)).rows(range(3))
    stream = shards(JsonLines(path=path, streaming=True))
    assert stream.num_shards == 1
    for start in range(4):
        assert list(stream.read(0, start)) == whole[start:]


def test_a_byte_order_mark_is_not_part_of_the_row(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"n": 0}\n{"n": 1}\n')
    expected = [Row({"n": 0}, f"{path}:1"), Row({"n": 1}, f"{path}:2")]
    assert table(JsonLines(path=path)).rows([0, 1]) == expected
    assert list(shards(JsonLines(path=path, streaming=True)).read(0, 0)) == expected


def test_folders_and_globs_are_read_by_name(tmp_path: Path):
    for name, lines in (("b.jsonl", [2]), ("a.jsonl", [0, 1]), ("c.jsonl", []), ("sub/d.jsonl", [9]), ("e.txt", [9])):
        write(tmp_path / name, "".join(f'{{"n": {n}}}\n' for n in lines))
    for path in (str(tmp_path), f"{tmp_path}/*.jsonl"):
        rows = table(JsonLines(path=path))
        assert [row.record["n"] for row in rows.rows(range(len(rows)))] == [0, 1, 2]
        assert rows.rows([2, 1])[0].where == f"{tmp_path}/b.jsonl:1"
        stream = shards(JsonLines(path=path, streaming=True))
        assert [[row.record["n"] for row in stream.read(s, 0)] for s in range(stream.num_shards)] == [[0, 1], [2], []]
    assert len(table(JsonLines(path=f"{tmp_path}/**/*.jsonl"))) == 4


def test_a_file_whose_name_looks_like_a_glob(tmp_path: Path):
    path = write(tmp_path / "a[1].jsonl", '{"n": 0}\n')
    assert table(JsonLines(path=path)).rows([0])[0].where == f"{path}:1"


def test_columns_are_renamed(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", '{"q": "2+2?", "a": "4", "text": "2+2? 4", "prompt": "old"}\n')
    columns = {"q": "prompt", "a": "completion", "text": "unused", "absent": "tools"}
    expected = {"prompt": "2+2?", "completion": "4", "unused": "2+2? 4"}
    assert table(JsonLines(path=path, columns=columns)).rows([0])[0].record == expected
    assert next(shards(JsonLines(path=path, columns=columns, streaming=True)).read(0, 0)).record == expected


def test_a_url_is_read_through_fsspec():
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe({"/jsonl-test/b.jsonl": b'{"n": 2}\n', "/jsonl-test/a.jsonl": b'{"n": 0}\n\n{"n": 1}'})
    for path in ("memory://jsonl-test", "memory://jsonl-test/*.jsonl"):
        rows = table(JsonLines(path=path))
        found = rows.rows([2, 1, 0])
        assert [row.record["n"] for row in found] == [2, 1, 0]
        assert found[1].where == "memory:///jsonl-test/a.jsonl:3"
        stream = shards(JsonLines(path=path, streaming=True))
        assert [row.record["n"] for row in stream.read(0, 1)] == [1]
    assert len(table(JsonLines(path="memory://jsonl-test/a.jsonl"))) == 2


BROKEN = [
    (b'{"n": 0}\n{"n": }\n', "bad JSON: Expecting value at column 7", "fix or remove the line"),
    (b"{}\n{'n': 0}\n", "bad JSON: Expecting property name enclosed in double quotes at column 2", "fix"),
    (b'{}\n{"n": "\xe4"}\n', "byte 0xe4 at column 8 is not UTF-8", "iconv"),
    (b'{}\n{"n": "abc', "the last line is cut short", "write the file again"),
    (b'{}\n{"n": "\xc3', "the last line is cut short: it has no newline and is not whole JSON (byte 0xc3", "again"),
    (b"{}\n[1, 2]\n", "the line holds a list, not an object", "one JSON object a line"),
    (b'{}\n"abc"\n', "the line holds a str, not an object", "one JSON object a line"),
    (b"{}\n[\n", "bad JSON: Expecting value at column 2", "jq -c"),
    (b"{}\n" + b"[" * 100_000 + b"\n", "bad JSON: nested too deeply", ""),
]


@pytest.mark.parametrize(("text", "reason", "cure"), BROKEN, ids=[reason for _, reason, _ in BROKEN])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_line_is_named(tmp_path: Path, text: bytes, reason: str, cure: str, streaming: bool):
    path = write(tmp_path / "a.jsonl", text)
    error = refused(path, row=1, streaming=streaming)
    assert error.where == f"{path}:2"
    assert reason in error.reason
    assert cure in error.cure


def test_a_broken_line_does_not_hinder_the_others(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", b'{"n": 0}\nnonsense\n{"n": 2}\n')
    assert [row.record["n"] for row in table(JsonLines(path=path)).rows([2, 0])] == [2, 0]
    assert [row.record["n"] for row in shards(JsonLines(path=path, streaming=True)).read(0, 2)] == [2]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("text", [b"", b"\n \r\n\n"])
def test_zero_rows(tmp_path: Path, streaming: bool, text: bytes):
    path = write(tmp_path / "a.jsonl", text)
    error = refused(path, streaming=streaming)
    assert (error.where, error.reason) == (path, "holds no row")


def test_missing_files_are_refused_with_near_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data/train.jsonl", "{}\n")
    error = refused("data/trian.jsonl")
    assert (error.where, error.reason) == ("data/trian.jsonl", "no such file")
    assert error.cure == "did you mean data/train.jsonl?"
    error = refused("dta/train.jsonl")
    assert error.reason == "no such file, and no folder 'dta'"
    assert error.cure == "did you mean data?"
    assert "relative to the current folder" in refused("other.jsonl").cure
    assert refused("data/*.json").reason == "no file matches"
    (tmp_path / "empty").mkdir()
    assert refused("empty").reason == "the folder holds no *.jsonl file"


def test_unreachable_urls_are_refused():
    assert refused("memory://nowhere/a.jsonl").reason == "no such file"
    error = refused("nosuch://bucket/a.jsonl")
    assert error.where == "nosuch://bucket/a.jsonl"
    assert "Protocol not known" in error.reason


def test_reading_is_lazy(tmp_path: Path):
    """Rows far behind the first are not parsed, and nothing of the file is kept but its offsets."""
    path = write(tmp_path / "a.jsonl", b'{"n": 0}\n' + b"nonsense\n" * 1000)
    opened = JsonLines(path=path).open()
    assert isinstance(opened, JsonlTable)
    assert opened.rows([0])[0].record == {"n": 0}
    stream = JsonLines(path=path, streaming=True).open()
    assert isinstance(stream, JsonlShards)
    assert next(stream.read(0, 0)).record == {"n": 0}


def test_a_recipes_block_makes_the_source(tmp_path: Path):
    from burnish.component import OneOf

    found = OneOf("burnish.data.sources").find(Source, "jsonl")
    assert found is JsonLines
    assert sorted(OneOf("burnish.data.sources").types()) == [
        "events",
        "huggingface",
        "jsonl",
        "parquet",
        "reasoning_gym",
    ]
    block = json.dumps({"type": "jsonl", "path": "a.jsonl", "columns": {"q": "prompt"}})
    assert found.model_validate_json(block) == JsonLines(path="a.jsonl", columns={"q": "prompt"})
