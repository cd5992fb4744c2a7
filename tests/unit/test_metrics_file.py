from __future__ import annotations

import json
import math
import os
import resource
import struct
from contextlib import contextmanager

from burnish.launch.metrics_file import JsonLines, MetricsFile, read_metrics, write_atomically

ODD_FLOATS = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 2.302585092994046]


@contextmanager
def files_no_longer_than(size: int):
    """The kernel refuses to write beyond: a full disk, as far as the writer can tell."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_floats_come_back_bit_for_bit(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step, loss in enumerate(ODD_FLOATS, start=1):
        metrics.write(step, {"loss": loss, "tokens": 7})
    found = read_metrics(tmp_path / "metrics.jsonl")  # in the file before it is closed
    assert [struct.pack("<d", record["loss"]) for record in found] == [struct.pack("<d", x) for x in ODD_FLOATS]
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5, 6]
    metrics.close()


def test_nan_and_infinity_are_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.write(1, {"loss": math.nan, "grad_norm": math.inf, "other": -math.inf})
    metrics.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "step": 1,
        "loss": "NaN",
        "grad_norm": "Infinity",
        "other": "-Infinity",
    }
    (record,) = read_metrics(path)
    assert math.isnan(record["loss"]) and (record["grad_norm"], record["other"]) == (math.inf, -math.inf)


def test_cut_drops_later_steps_and_the_torn_line_and_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 0, "eval_loss": 9.0}\n{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "l'
    )
    metrics = MetricsFile(path)
    metrics.cut(1)
    metrics.write(2, {"loss": 2.5})
    metrics.close()
    assert path.read_bytes() == b'{"step": 0, "eval_loss": 9.0}\n{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.5}\n'
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_cut_keeps_a_torn_line_out_even_where_no_step_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2')
    metrics = MetricsFile(path)
    metrics.cut(2)
    metrics.close()
    assert path.read_bytes() == b'{"step": 1, "loss": 3.0}\n'


def test_a_run_that_begins_anew_begins_with_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "eval_loss": 9.0}\n{"step": 1, "loss": 3.0}\n')
    metrics = MetricsFile(path)
    metrics.cut(0)
    metrics.write(0, {"eval_loss": 8.0})
    metrics.close()
    assert path.read_bytes() == b'{"step": 0, "eval_loss": 8.0}\n'


def test_what_a_full_disk_refuses_is_written_later_without_a_torn_line(tmp_path):
    path = tmp_path / "lines.jsonl"
    lines = JsonLines(path)
    with files_no_longer_than(20):
        assert lines.append({"a": 1}) is True  # 9 bytes, 18 with the next
        assert lines.append({"b": 2}) is True
        assert lines.append({"c": 3}) is False  # 2 bytes of it fit
        assert lines.append({"d": 4}) is False
        assert path.stat().st_size == 20
    assert lines.append({"e": 5}) is True
    lines.close()
    assert path.read_bytes() == b'{"a": 1}\n{"b": 2}\n{"c": 3}\n{"d": 4}\n{"e": 5}\n'


def test_a_line_torn_by_a_killed_process_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": ')
    lines = JsonLines(path)
    lines.append({"c": 3})
    lines.close()
    assert path.read_bytes() == b'{"a": 1}\n{"b": \n{"c": 3}\n'


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "recipe.json"
    write_atomically(path, b"old")
    with files_no_longer_than(4):
        try:
            write_atomically(path, b"newer")
        except OSError:
            failed = True
    assert failed and path.read_bytes() == b"old"
    write_atomically(path, b"newer")
    assert path.read_bytes() == b"newer" and os.listdir(tmp_path) == ["recipe.json"]
