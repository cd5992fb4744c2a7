"""Pairs and single judged answers: what they are written in, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from burnish.data.formats import Conversation, parts
from burnish.errors import DataError
from burnish.types import CONVERSATIONS, Row, RowFormat
from tests.formats_helpers import BAD, GOOD, USER, context, parsed, refusal, said

PAIRS, UNPAIRED = RowFormat("preference"), RowFormat("unpaired")
SYSTEM = {"role": "system", "content": "Short."}
TOOL = {"role": "tool", "content": "4"}


def pair(record: dict[str, Any]) -> tuple[Any, Any]:
    chosen, rejected = parsed(record, PAIRS)
    assert (chosen.name, rejected.name) == ("chosen", "rejected")
    assert (chosen.columns["preference"], rejected.columns["preference"]) == (1.0, -1.0)
    return said(chosen), said(rejected)


def test_strings():
    assert pair({"prompt": "2+2=", "chosen": "4", "rejected": "5"}) == (("2+2=", "4"), ("2+2=", "5"))
    # A string answer may begin as the prompt does: nothing is cut off.
    assert pair({"prompt": "a", "chosen": "ab", "rejected": "ac"}) == (("a", "ab"), ("a", "ac"))


def test_messages_of_which_only_the_answers_train():
    record = {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]}
    before = [context(SYSTEM), context(USER)]
    assert pair(record) == ([*before, GOOD], [*before, BAD])


def test_what_goes_into_the_template_weight_and_margin():
    record = {
        "prompt": [USER],
        "chosen": [GOOD],
        "rejected": [BAD],
        "weight": 2,
        "margin": 0.5,
        "tools": [{"name": "add"}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    for part, answer in zip(parsed(record, PAIRS), (GOOD, BAD), strict=True):
        kwargs = {"enable_thinking": False}
        assert part.content == Conversation([context(USER), answer], [{"name": "add"}], kwargs, 2.0)
        assert part.columns["margin"] == 0.5
    assert parsed(record | {"margin": None}, PAIRS)[0].columns["margin"] == 0.0


@pytest.mark.parametrize(
    "prompt",
    [{"prompt": [USER]}, {"prompt": "2+2?"}, {}, {"prompt": None}],
    ids=["messages", "the user's string", "none", "null"],
)
def test_lists_that_begin_with_the_prompt(prompt: dict[str, Any]):
    record = {"chosen": [USER, GOOD], "rejected": [USER, BAD], **prompt}
    assert pair(record) == ([context(USER), GOOD], [context(USER), BAD])


def test_a_prompt_as_a_string_before_answers_as_messages():
    record = {"prompt": "2+2?", "chosen": [GOOD], "rejected": [BAD]}
    assert pair(record) == ([context(USER), GOOD], [context(USER), BAD])


def test_the_implicit_prompt_of_messages_is_their_longest_common_beginning():
    chosen, rejected = pair({"chosen": [SYSTEM, USER, GOOD, USER, GOOD], "rejected": [SYSTEM, USER, GOOD, USER, BAD]})
    before = [context(SYSTEM), context(USER), context(GOOD), context(USER)]
    assert (chosen, rejected) == ([*before, GOOD], [*before, BAD])
    # One goes on where the other ends: both keep an answer.
    chosen, rejected = pair({"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]})
    assert (chosen, rejected) == ([context(USER), GOOD], [context(USER), GOOD, USER, BAD])


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: hi A: the cat", "Q: hi A: the car", "Q: hi A: the"),  # in mid-word; the space goes with the word
        ("Q: hi\nA: yes", "Q: hi\nA: no", "Q: hi\nA:"),
        ("Q: hi\nyes", "Q: hi\nno", "Q: hi\n"),  # a line break stays with the prompt
        ("yes", "no", ""),
        ("so 4", "so 4 or 5", "so"),  # one is the beginning of the other: each keeps a word
    ],
)
def test_the_implicit_prompt_of_strings_ends_at_a_word(chosen: str, rejected: str, prompt: str):
    cut = len(prompt)
    assert pair({"chosen": chosen, "rejected": rejected}) == ((prompt, chosen[cut:]), (prompt, rejected[cut:]))


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are identical", "remove the row"),
    ({"chosen": [USER, GOOD], "rejected": [USER, {**GOOD, "name": None}]}, "are identical", "remove the row"),
    ({"prompt": "a", "chosen": "b"}, "rejected: is missing: a pair has two answers", "remove the row"),
    ({"prompt": "a", "chosen": None, "rejected": "b"}, "chosen: is missing", "remove the row"),
    ({"prompt": "a", "chosen": "", "rejected": "b"}, "chosen: is empty", "remove the row"),
    ({"prompt": [USER], "chosen": [GOOD], "rejected": []}, "rejected: is empty", "remove the row"),
    ({"prompt": [USER], "chosen": [GOOD], "rejected": "5"}, "chosen is a list, rejected is a str", "all as lists"),
    ({"prompt": [USER], "chosen": "4", "rejected": "5"}, "prompt is a list, chosen is a str", "as strings"),
    (
        {"prompt": [SYSTEM], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        "chosen: holds a whole conversation that does not begin with the prompt: they part at chosen[0]",
        "`columns: {prompt: unused}`",
    ),
    (
        {"prompt": [SYSTEM, USER], "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, {**USER, "content": "3+3?"}]},
        "rejected: holds a whole conversation that does not begin with the prompt: they part at rejected[1]",
        "",
    ),
    (
        {"prompt": "3+3?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        "prompt: '3+3?' is not among the messages that chosen and rejected begin with",
        "`columns: {prompt: unused}`",
    ),
    (
        {"chosen": [USER, GOOD], "rejected": [{**USER, "content": "3+3?"}, BAD]},
        "chosen and rejected part at chosen[0], which is a user turn",
        "one prompt",
    ),
    ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD, TOOL]}, "rejected: ends with a tool turn", "one prompt"),
    ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "chosen: holds the prompt and no answer", "remove"),
    ({"prompt": [USER], "chosen": [TOOL], "rejected": [BAD]}, "chosen: ends with a tool turn", "one prompt"),
    ({"prompt": [USER], "chosen": [GOOD], "rejected": [{**BAD, "content": " "}]}, "rejected[0]: empty assistant", ""),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "big"}, "margin: 'big' is not a number", "margin"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": True}, "margin: True is not a number", "margin"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "weight": -1}, "weight: -1 is not a weight", "unused"),
    (
        {"messages": [USER, GOOD]},
        "a row of the kind conversation, and the workflow's loss reads the kind preference: the row has messages",
        "`workflow: {type: sft}`",
    ),
    (
        {"prompt": "a", "completion": "b", "label": True},
        "a row of the kind unpaired, and the workflow's loss reads the kind preference",
        "loss: {type: kto}",
    ),
    ({"question": "a"}, "unknown format: the row has question; accepted are chosen and rejected", "columns:"),
]


@pytest.mark.parametrize(("record", "reason", "cure"), REFUSED, ids=[reason for _, reason, _ in REFUSED])
def test_pairs_that_are_refused(record: dict[str, Any], reason: str, cure: str):
    error = refusal(record, PAIRS)
    assert reason in error.reason
    assert cure in error.cure


@pytest.mark.parametrize(
    ("label", "sign"),
    [({"label": True}, 1), ({"label": False}, -1), ({"label": "desirable"}, 1), ({"kto_tag": "undesirable"}, -1)],
)
def test_judged_answers(label: dict[str, Any], sign: int):
    (part,) = parsed({"prompt": "2+2=", "completion": "4", **label}, UNPAIRED)
    assert said(part) == ("2+2=", "4") and part.columns == {"preference": sign}
    (part,) = parsed({"prompt": [USER], "completion": [GOOD], **label}, UNPAIRED)
    assert said(part) == [context(USER), GOOD] and part.columns == {"preference": sign}


UNPAIRED_REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": "a", "completion": "b"}, "label: is missing", "fill it in"),
    ({"prompt": "a", "completion": "b", "label": None}, "label: is missing", "fill it in"),
    ({"prompt": "a", "completion": "b", "label": 1}, "label: 1 is neither true nor false", "desirable"),
    ({"prompt": "a", "completion": "b", "label": "good"}, "label: 'good' is neither true nor false", "desirable"),
    ({"prompt": "a", "completion": "b", "label": [True]}, "label: [True] is neither true nor false", "desirable"),
    ({"prompt": "a", "completion": "", "label": True}, "completion: is empty", "remove the row"),
    (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        "a row of the kind preference, and the workflow's loss reads",
        "preference",
    ),
]


@pytest.mark.parametrize(
    ("record", "reason", "cure"), UNPAIRED_REFUSED, ids=[reason for _, reason, _ in UNPAIRED_REFUSED]
)
def test_judged_answers_that_are_refused(record: dict[str, Any], reason: str, cure: str):
    error = refusal(record, UNPAIRED)
    assert reason in error.reason
    assert cure in error.cure


def test_pairs_are_not_imitated():
    error = refusal({"prompt": "a", "chosen": "b", "rejected": "c"}, RowFormat())
    assert "the row has prompt, chosen, rejected" in error.reason
    assert "`workflow: {type: preference}`" in error.cure


def test_an_answer_that_is_marked_bad_is_not_imitated():
    bad = Row({"prompt": "a", "completion": "b", "label": False}, "rows.jsonl:4")
    with pytest.raises(DataError, match="marked bad, and would be imitated") as refused:
        parts(bad, CONVERSATIONS)
    assert refused.value.where == "rows.jsonl:4"
    assert len(parts(Row({"prompt": "a", "completion": "b", "label": True}, "rows.jsonl:5"), CONVERSATIONS)) == 1
