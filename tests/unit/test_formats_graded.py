"""Rows for heads: steps with grades, labels, queries with their answers."""

from __future__ import annotations

from math import isnan
from typing import Any

import pytest

from burnish.data.formats import Steps
from burnish.types import RowFormat
from tests.formats_helpers import BAD, GOOD, USER, context, parsed, refusal, said

STEPWISE, RETRIEVAL = RowFormat("stepwise"), RowFormat("retrieval")
LABELS = RowFormat("labelled", {"label": ("negative", "positive")})
TASKS = RowFormat("labelled", {"topic": ("sport", "art", "law"), "quality": ()})


def test_steps_are_joined_by_line_breaks_and_end_with_their_last_character():
    (part,) = parsed({"prompt": "2+2+1?", "completions": ["2+2 is 4", "so 6"], "labels": [True, False]}, STEPWISE)
    # "\n2+2 is 4" are 9 characters, "\nso 6" 5 more.
    assert part.steps == Steps("\n2+2 is 4\nso 6", (9, 14), (1.0, 0.0))
    assert said(part) == ("2+2+1?", "\n2+2 is 4\nso 6") and not part.columns


def test_steps_that_bring_their_own_white_space():
    (part,) = parsed({"prompt": "The sky", "completions": [" is blue\n\n", "at noon."], "labels": [1, 0.25]}, STEPWISE)
    assert part.steps == Steps(" is blue\n\nat noon.", (8, 18), (1.0, 0.25))


def test_steps_behind_messages_are_an_assistant_turn():
    (part,) = parsed({"prompt": [USER], "completions": [" add\n", "4 "], "labels": [1, 1]}, STEPWISE)
    assert part.steps == Steps("add\n4", (3, 5), (1.0, 1.0))
    assert said(part) == [context(USER), {"role": "assistant", "content": "add\n4"}]


STEPS_REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": "a", "completions": ["b"], "labels": [1, 0]}, "1 completions and 2 labels", "one label"),
    ({"prompt": "a", "completions": [], "labels": []}, "completions: [] is not a list", "remove"),
    ({"prompt": "a", "completions": "b", "labels": [1]}, "completions: 'b' is not a list", "remove"),
    ({"prompt": "a", "completions": ["b", " "], "labels": [1, 1]}, "completions[1]: ' ' is not a step", "string"),
    ({"prompt": "a", "completions": ["b"], "labels": ["+"]}, "labels[0]: '+' does not grade a step", "0 (wrong)"),
    ({"prompt": "a", "completions": ["b"], "labels": [-1]}, "labels[0]: -1 does not grade a step", "0 (wrong)"),
    ({"prompt": "a", "completions": ["b"], "labels": [float("nan")]}, "labels[0]: nan does not grade", "0 (wrong)"),
    ({"prompt": "a", "completions": ["b"]}, "labels: is missing", "`labels`"),
    ({"prompt": "", "completions": ["b"], "labels": [1]}, "prompt: is empty", "remove"),
    (
        {"messages": [USER, GOOD]},
        "a row of the kind conversation, and the workflow's loss reads the kind stepwise",
        "sft",
    ),
]


@pytest.mark.parametrize(("record", "reason", "cure"), STEPS_REFUSED, ids=[reason for _, reason, _ in STEPS_REFUSED])
def test_steps_that_are_refused(record: dict[str, Any], reason: str, cure: str):
    error = refusal(record, STEPWISE)
    assert reason in error.reason
    assert cure in error.cure


@pytest.mark.parametrize(("written", "number"), [("positive", 1), ("negative", 0), (0, 0), (1.0, 1), (True, 1)])
def test_a_class_by_name_or_index(written: Any, number: float):
    (part,) = parsed({"text": "fine", "label": written}, LABELS)
    assert said(part) == "fine" and part.columns == {"label": number} and not part.trains


@pytest.mark.parametrize(
    ("classes", "written", "number"),
    [
        (("true", "false"), True, 0),
        (("True", "False"), False, 1),
        (("no", "yes"), True, 1),
        (("1", "2", "3"), 1, 0),
        (("1", "2", "3"), 3.0, 2),
        (("0", "1"), True, 1),
        (("0", "1"), 0, 0),
    ],
)
def test_a_value_that_spells_a_class_is_not_an_index(classes: tuple[str, ...], written: Any, number: float):
    (part,) = parsed({"text": "fine", "label": written}, RowFormat("labelled", {"label": classes}))
    assert part.columns == {"label": number}


def test_classes_called_by_numbers_have_no_indices():
    error = refusal({"text": "fine", "label": 0}, RowFormat("labelled", {"label": ("1", "2", "3")}))
    assert error.reason == "label: 0 is none of the classes 1, 2, 3" and error.cure == "write a class by its name"


def test_labels_of_several_tasks_in_columns_or_in_one():
    (part,) = parsed({"messages": [USER, GOOD], "topic": "law", "quality": 0.5}, TASKS)
    assert part.columns == {"topic": 2.0, "quality": 0.5} and said(part) == [USER, GOOD]
    (part,) = parsed({"prompt": "a", "completion": "b", "labels": {"topic": 1, "other": 3}}, TASKS)
    assert part.columns["topic"] == 1.0 and isnan(part.columns["quality"])


def test_a_conversation_with_labels_needs_no_assistant():
    (part,) = parsed({"messages": [USER], "label": 1}, LABELS)
    assert said(part) == [USER]


LABELS_REFUSED: list[tuple[RowFormat, dict[str, Any], str, str]] = [
    (LABELS, {"label": 2}, "label: 2 is none of the classes 0: negative, 1: positive", "index"),
    (LABELS, {"label": -1}, "label: -1 is none of the classes", "index"),
    (LABELS, {"label": 0.5}, "label: 0.5 is none of the classes", "index"),
    (LABELS, {"label": "pos"}, "label: 'pos' is none of the classes 0: negative, 1: positive", "name"),
    (LABELS, {"label": [1]}, "label: [1] is none of the classes", "name"),
    (LABELS, {}, "label: is missing, so there is nothing to learn", "fill it in"),
    (TASKS, {"topic": None, "labels": {}}, "topic or quality: is missing", "remove the row"),
    (TASKS, {"quality": "good"}, "quality: 'good' is not a number", "a number"),
    (TASKS, {"quality": float("inf")}, "quality: inf is not a number", "a number"),
]


@pytest.mark.parametrize(
    ("row_format", "record", "reason", "cure"), LABELS_REFUSED, ids=[reason for *_, reason, _ in LABELS_REFUSED]
)
def test_labels_that_are_refused(row_format: RowFormat, record: dict[str, Any], reason: str, cure: str):
    error = refusal({"text": "a", **record}, row_format)
    assert reason in error.reason
    assert cure in error.cure


def test_a_query_and_what_answers_it():
    found = parsed({"query": "who?", "positive": "he", "negative": ["she", "it"], "weight": 0.5}, RETRIEVAL)
    assert [(said(part), part.columns["role"], part.name) for part in found] == [
        ("who?", 0.0, "query"),
        ("he", 1.0, "positive"),
        ("she", 2.0, "negative"),
        ("it", 2.0, "negative"),
    ]
    assert all(part.content.weight == 0.5 and not part.trains for part in found)
    assert [said(part) for part in parsed({"anchor": "a", "positive": "b", "negative": "c"}, RETRIEVAL)] == list("abc")
    assert [said(part) for part in parsed({"anchor": "a", "positive": "b", "negative": None}, RETRIEVAL)] == list("ab")


QUERIES_REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"query": "", "positive": "b"}, "query: is empty", "remove the row"),
    ({"query": "a", "positive": " "}, "positive: is empty", "remove the row"),
    ({"query": "a"}, "positive: is missing", "remove the row"),
    ({"positive": "b"}, "query: is missing", "remove the row"),
    ({"query": "a", "positive": "b", "negative": ["c", None]}, "negative: is missing", "remove the row"),
    ({"query": "a", "positive": ["b"]}, "positive: ['b'] is not a string", "one string"),
    ({"query": "a", "positive": "b", "negative": ["c", "b"]}, "the positive is among the negatives", "remove it"),
    (
        {"chosen": [GOOD], "rejected": [BAD]},
        "a row of the kind preference, and the workflow's loss reads the kind retrieval",
        "{type",
    ),
]


@pytest.mark.parametrize(
    ("record", "reason", "cure"), QUERIES_REFUSED, ids=[reason for _, reason, _ in QUERIES_REFUSED]
)
def test_queries_that_are_refused(record: dict[str, Any], reason: str, cure: str):
    error = refusal(record, RETRIEVAL)
    assert reason in error.reason
    assert cure in error.cure
