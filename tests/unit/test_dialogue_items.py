"""Histories as prompts: what is given is asked, items are sampled, what came later is what rewards compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from burnish.data.renderers.events import Events
from burnish.data.sources.events import Events as EventSource
from burnish.data.sources.events import Span, spans
from burnish.errors import DataError
from burnish.rollouts import Dialogue, Dropped, Prompt
from burnish.types import Row
from tests.events_helpers import history, vocabulary, write


def dialogue(tokenizer: Any, **fields: Any) -> Dialogue:
    return Events(**fields).open(tokenizer).dialogue()


def asked(live: Dialogue, row: Row) -> Any:
    (found,) = live.prompts([row], 3)
    return found


def test_what_is_given_is_the_prompt_and_what_came_later_the_future(tmp_path):
    live = dialogue(vocabulary(tmp_path))
    found = asked(live, history("a b c d e", given=3))
    assert found == Prompt(3, "table.csv:2, user 7", [1, 2, 3], ["a", "b", "c"], {"user": "7", "future": ["d", "e"]})


def test_the_most_recent_events_are_given_and_bos_only_at_a_beginning(tmp_path):
    live = dialogue(vocabulary(tmp_path, bos=True), max_events=2)
    assert asked(live, history("a b c", given=2)).token_ids == [1, 2, 3]  # <pad> is 0, <bos> 1, a 2
    cut = asked(live, history("a b c d", given=3))
    assert (cut.token_ids, cut.asked, cut.columns["future"]) == ([3, 4], ["b", "c"], ["d"])


def test_context_and_feedback_stand_around_given_items(tmp_path):
    tokenizer = vocabulary(tmp_path, features={"rating": ["1", "5"], "hour": ["9"]})
    live = dialogue(tokenizer, context=["hour"], feedback=["rating"])
    found = asked(live, history("a b c", given=2, rating=["5", "1", "5"], hour=["9", "9", "9"]))
    words = tokenizer.convert_ids_to_tokens(found.token_ids)
    assert words == ["hour=9", "a", "rating=5", "hour=9", "b", "rating=1"]
    sampled = tokenizer.convert_tokens_to_ids(["hour=9", "c", "rating=1", "<pad>", "d"])
    assert live.said(found, [sampled]) == ["c", "", "d"]  # features take no slot, what is no item takes one
    assert live.text(sampled) == "c d"


def test_items_of_several_codes_are_said_whole_or_not_at_all(tmp_path):
    codes = '{"item": "x", "codes": [1, 1]}\n{"item": "y", "codes": [1, 2]}\n{"item": "z", "codes": [2, 1]}\n'
    from burnish.data.tokenizers.vocabulary import Vocabulary

    tokenizer = Vocabulary(codes=write(tmp_path / "codes.jsonl", codes)).open(None)
    live = dialogue(tokenizer)
    found = asked(live, history("x y z", given=2))
    assert tokenizer.convert_ids_to_tokens(found.token_ids) == ["c1=1", "c2=1", "c1=1", "c2=2"]
    sampled = tokenizer.convert_tokens_to_ids(["c1=2", "c2=1", "c1=2", "c2=2", "c1=1"])
    assert live.said(found, [sampled]) == ["z", "", ""]


def test_a_turn_is_as_long_as_it_may_be(tmp_path):
    assert dialogue(vocabulary(tmp_path)).stop_token_ids == ()


def test_an_environment_answers_with_names(tmp_path):
    live = dialogue(vocabulary(tmp_path, features={"rating": ["1", "5"]}), feedback=["rating"])
    found = asked(live, history("a b", given=1, rating=["5", "1"]))
    assert live.observe(found, [[4]], [{"role": "user", "content": "rating=5 f"}]) == [2, 8]
    assert live.said(found, [[4], [{"role": "user", "content": "f"}], [5, 6]]) == ["b", "c", "d"]
    with pytest.raises(DataError, match="table.csv:2, user 7: the environment said 'g'"):
        live.observe(found, [[4]], [{"role": "user", "content": "g"}])


@pytest.mark.parametrize(
    ("items", "given", "what"), [("a b", 0, "given"), ("a b", 2, "left to predict"), ("", 0, "given")]
)
def test_a_history_without_past_or_future_is_refused_or_dropped(items, given, what, tmp_path):
    refusal = asked(dialogue(vocabulary(tmp_path)), history(items, given))
    assert isinstance(refusal, DataError) and f"nothing is {what}" in refusal.reason
    dropped = asked(dialogue(vocabulary(tmp_path), short="drop"), history(items, given))
    assert isinstance(dropped, Dropped) and dropped.index == 3 and f"nothing is {what}" in dropped.reason


def test_unknown_items_are_refused_or_leave_past_and_future(tmp_path):
    row = history("a new b c newer d", given=3)
    assert isinstance(asked(dialogue(vocabulary(tmp_path)), row), DataError)
    found = asked(dialogue(vocabulary(tmp_path), unknown="drop"), row)
    assert (found.asked, found.columns["future"]) == (["a", "b"], ["c", "d"])


def test_a_source_says_how_many_of_a_history_are_its_future(tmp_path: Path):
    assert spans(9, "train", 4, future=1) == [Span(0, 4, 3), Span(2, 6, 3), Span(4, 7, 2)]
    assert spans(6, "valid", None, future=2) == [Span(0, 5, 3)]
    assert spans(2, "all", None, future=5) == [Span(0, 2, 0)]
    lines = "".join(f"1,{item},{time}\n" for time, item in enumerate("abcdef"))
    table = EventSource(path=write(tmp_path / "t.csv", f"user,item,timestamp\n{lines}"), part="test", future=2).open()
    found = asked(dialogue(vocabulary(tmp_path)), table.rows([0])[0])
    assert (found.asked, found.columns) == (list("abcd"), {"user": "1", "future": ["e", "f"]})
