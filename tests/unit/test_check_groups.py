"""`burnish check` of recipes whose losses compare documents: rows too short for pairs, steps with one document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from burnish import cli
from tests import tiny_run


def warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path, rows: list[dict[str, Any]], **blocks: Any
) -> list[tuple[str, str]]:
    """(text, cure) of each warning about the data; memory depends on the machine."""
    recipe = tiny_run.recipe(model, tiny_run.write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "run")
    recipe["data"] |= blocks.pop("data")
    code = cli.main(["check", str(tiny_run.write_recipe(tmp_path / "r.yaml", recipe | blocks)), "--json"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert code == 0, findings
    return [(f["text"], f["cure"]) for f in findings if f["verdict"] == "warning" and f["stage"] in ("masks", "batch")]


DPO = {"type": "preference", "loss": {"type": "dpo"}}
KTO = {"type": "preference", "loss": {"type": "kto"}}
# Characters that merge with nothing, and an end behind each answer: documents of 4 + 21 and 4 + 2 tokens, 4 + 32 and
# 4 + 29, 4 + 32 and 4 + 100.
PAIRS = [
    {"prompt": "????", "chosen": "?" * 20, "rejected": "!"},
    {"prompt": "????", "chosen": "?" * 31, "rejected": "!" * 28},
    {"prompt": "????", "chosen": "?" * 31, "rejected": "!" * 99},
]


@pytest.mark.parametrize(
    ("over_length", "said"),
    [
        ("truncate", "2 of 3 rows, up to 76 tokens"),  # 36 + 33 and 36 + 40
        ("drop", "1 of 3 rows, up to 69 tokens"),  # the other is dropped for its own length
    ],
)
def test_pairs_longer_than_a_row_are_told_and_cured(tmp_path, capsys, tiny_model, over_length, said):
    data = {"max_length": 40, "over_length": over_length, "packing": {"type": "none"}}
    [(text, cure)] = warnings(tmp_path, capsys, tiny_model, PAIRS, data=data, workflow=DPO)
    assert text == (
        f"data.train.0: the documents of {said}, exceed a packed row of 40 tokens together: "
        f"`over_length: {over_length}` cuts or drops them"
    )
    assert cure == "data.packing.row_length: 80"
    data["packing"] = {"type": "none", "row_length": 80}
    assert warnings(tmp_path, capsys, tiny_model, PAIRS, data=data, workflow=DPO) == []


def test_kto_of_one_answer_a_step_is_told(tmp_path, capsys, tiny_model):
    rows = [{"prompt": "????", "completion": "!" * n, "label": n % 2 == 0} for n in (5, 6, 7, 8)]
    alone = {"data": {"packing": {"type": "none"}}, "workflow": KTO}
    [(text, cure)] = warnings(tmp_path, capsys, tiny_model, rows, **alone, global_batch_size=1)
    assert text == "a step holds about 1.0 answers; of one alone the KL estimate of `kto` is always 0"
    assert cure == "raise global_batch_size"
    assert warnings(tmp_path, capsys, tiny_model, rows, **alone, global_batch_size=2) == []
