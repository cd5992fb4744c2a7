"""The prompts of a run: a function of seed, sources and index."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from burnish.data.config import DataConfig
from burnish.data.prompts import Prompts, open_prompts
from burnish.data.renderers.chat import Chat
from burnish.data.sources.base import Source
from burnish.errors import DataError, ResumeError
from burnish.rollouts import Dialogue, Dropped, Prompt
from burnish.types import Row
from tests.chat_helpers import byte_level
from tests.tiny_run import write_jsonl


@pytest.fixture(scope="module")
def dialogue() -> Dialogue:
    return Chat().open(byte_level(None)).dialogue()


def source(path: Path, count: int, name: str = "row", **fields: Any) -> dict[str, Any]:
    """A file of so many prompts, `row 0`, `row 1`, ..."""
    write_jsonl(path, [{"prompt": f"{name} {number}"} for number in range(count)])
    return {"type": "jsonl", "path": str(path), **fields}


def opened(dialogue: Dialogue, *train: dict[str, Any], epochs: int | None = 1, seed: int = 0, **fields: Any) -> Prompts:
    data = DataConfig.model_validate({"train": list(train), **fields})
    return open_prompts(data, dialogue, seed=seed, num_epochs=epochs, max_prompt_length=8)


class Endless(Source):
    """A streamed source."""

    def open(self) -> Endless:
        return self

    num_shards: int = 1

    def read(self, shard: int, start: int) -> Iterator[Row]:
        yield Row({"prompt": "a"}, "nowhere")


def walked(prompts: Prompts, count: int) -> list[Any]:
    return [found.asked for index in range(count) if isinstance(found := prompts.get(index), Prompt)]


def test_every_epoch_asks_every_row_once_in_an_order_of_its_own(dialogue, tmp_path):
    prompts = opened(dialogue, source(tmp_path / "a.jsonl", 50), epochs=2)
    asked = walked(prompts, 100)
    assert sorted(asked[:50]) == sorted(asked[50:]) == sorted(f"row {number}" for number in range(50))
    assert asked[:50] != asked[50:] and asked[:50] != [f"row {number}" for number in range(50)]
    assert prompts.num_prompts == 100 and prompts.get(100) is None
    assert walked(opened(dialogue, source(tmp_path / "a.jsonl", 50), seed=1), 50) != asked[:50]


def test_a_prompt_depends_on_nothing_but_its_index(dialogue, tmp_path):
    sources = source(tmp_path / "a.jsonl", 700, weight=3.0), source(tmp_path / "b.jsonl", 300, "new")
    forwards = opened(dialogue, *sources, epochs=None)
    found = [forwards.get(index) for index in range(2100)]
    assert [one.index for one in found if one] == list(range(2100))
    assert sum(one.asked.startswith("row") for one in found if isinstance(one, Prompt)) == 1575  # 3 of 4
    backwards = opened(dialogue, *sources, epochs=None)
    for index in (2099, 5, 1024, 2047, 1023, 5, 0):
        assert backwards.get(index) == found[index]


def test_file_order_without_shuffling(dialogue, tmp_path):
    prompts = opened(dialogue, source(tmp_path / "a.jsonl", 40), shuffle=False)
    assert walked(prompts, 40) == [f"row {number}" for number in range(40)]
    second = prompts.get(1)
    assert isinstance(second, Prompt) and second.where == f"{tmp_path}/a.jsonl:2"


def test_a_long_prompt_is_refused_where_it_is_reached_or_dropped(dialogue, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "short"}\n{"prompt": "rather long"}\n{"prompt": "brief"}\n')
    given = {"type": "jsonl", "path": str(tmp_path / "a.jsonl")}
    strict = opened(dialogue, given, shuffle=False)
    assert isinstance(strict.get(0), Prompt) and isinstance(strict.get(2), Prompt)
    with pytest.raises(DataError, match=r"a.jsonl:2: the prompt has 11 tokens, and 8 leave room for an answer"):
        strict.get(1)
    lenient = opened(dialogue, given, shuffle=False, over_length="drop")
    assert lenient.get(1) == Dropped(1, f"{tmp_path}/a.jsonl:2", "prompt longer than 8 tokens")
    third = lenient.get(2)
    assert isinstance(third, Prompt) and (third.index, third.asked) == (2, "brief")


def test_a_bad_row_is_refused_where_it_is_reached_and_moves_no_other(dialogue, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\nnot json\n{"answer": 1}\n{"prompt": "b"}\n')
    prompts = opened(dialogue, {"type": "jsonl", "path": str(tmp_path / "a.jsonl")}, shuffle=False)
    last = prompts.get(3)
    assert isinstance(last, Prompt) and (last.index, last.asked) == (3, "b")
    with pytest.raises(DataError, match=r"a.jsonl:2: bad JSON"):
        prompts.get(1)
    with pytest.raises(DataError, match=r"a.jsonl:3: .*no `prompt`"):
        prompts.get(2)


def test_where_every_prompt_is_dropped_the_run_ends_instead_of_drawing_for_ever(dialogue, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "much too long"}] * 70)
    given = {"type": "jsonl", "path": str(tmp_path / "a.jsonl")}
    prompts = opened(dialogue, given, epochs=None, over_length="drop")
    with pytest.raises(DataError, match=r"nothing to ask: 96 prompts in a row were dropped \(prompt longer than 8"):
        for index in range(1000):
            prompts.get(index)


def test_what_cannot_be_asked_by_number_or_cut_is_refused_when_it_is_opened(dialogue, tmp_path):
    given = source(tmp_path / "a.jsonl", 3)
    with pytest.raises(DataError, match=r"data.over_length: a prompt that is cut asks something else"):
        opened(dialogue, given, over_length="truncate")
    with pytest.raises(DataError, match=r"data.train.1: prompts of a streamed source have no numbers"):
        opened(dialogue, given, {"type": "tests.unit.test_prompts:Endless"})


def test_a_resume_must_find_the_same_rows(dialogue, tmp_path):
    before = opened(dialogue, source(tmp_path / "a.jsonl", 3)).extent
    opened(dialogue, source(tmp_path / "a.jsonl", 3)).require(before)
    with pytest.raises(ResumeError, match=r"data.train.0: 4 rows now, 3 rows when the run was saved"):
        opened(dialogue, source(tmp_path / "a.jsonl", 4)).require(before)


def test_evaluation_is_once_through_in_file_order(dialogue, tmp_path):
    held_out = [source(tmp_path / "b.jsonl", 40, "held"), source(tmp_path / "c.jsonl", 2, "too long")]
    prompts = opened(dialogue, source(tmp_path / "a.jsonl", 3), eval=held_out, over_length="drop")
    found = list(prompts.evaluation())
    assert [one.asked for one in found] == [f"held {number}" for number in range(40)]
    assert [one.index for one in found] == list(range(40))
    strict = opened(dialogue, source(tmp_path / "a.jsonl", 3), eval=held_out)
    with pytest.raises(DataError, match=r"c.jsonl:1: the prompt has"):
        list(strict.evaluation())
