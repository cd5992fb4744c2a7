"""Every accepted row format, and every refusal with its place, reason and cure."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from burnish.data.formats import Completion, Conversation, Text, conversation
from burnish.errors import DataError
from burnish.types import Row

USER = {"role": "user", "content": "2+2?"}
ASSISTANT = {"role": "assistant", "content": "4"}


def normal(record: dict[str, Any]) -> Conversation | Completion | Text:
    before = copy.deepcopy(record)
    found = conversation(Row(record, "set.jsonl:17"))
    assert record == before, "the row was changed"
    return found


def refusal(record: dict[str, Any]) -> DataError:
    with pytest.raises(DataError) as caught:
        normal(record)
    assert caught.value.where == "set.jsonl:17"
    return caught.value


def messages_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    found = normal(record)
    assert isinstance(found, Conversation)
    return found.messages


def test_messages_keep_what_a_template_may_read_and_lose_nulls():
    record = {
        "messages": [
            {"role": "system", "content": "Be brief.", "name": None},
            {"role": "user", "content": [{"type": "text", "text": "2+2?"}], "name": "ann"},
            {"role": "assistant", "content": "4", "reasoning_content": "two twos", "train": False, "tool_calls": None},
        ],
        "tools": [{"type": "function", "function": {"name": "add"}}],
        "chat_template_kwargs": {"enable_thinking": False},
        "weight": 2,
        "id": "row-1",
    }
    assert normal(record) == Conversation(
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "2+2?"}], "name": "ann"},
            {"role": "assistant", "content": "4", "reasoning_content": "two twos", "train": False},
        ],
        tools=[{"type": "function", "function": {"name": "add"}}],
        chat_template_kwargs={"enable_thinking": False},
        weight=2.0,
    )


def test_returned_messages_are_not_the_rows_own():
    record = {"messages": [USER, ASSISTANT]}
    messages_of(record)[1]["train"] = False
    assert record["messages"][1] == {"role": "assistant", "content": "4"}


def test_tools_may_be_json_text_and_null_columns_do_not_count():
    record = {"messages": [USER, ASSISTANT], "tools": '[{"name": "add"}]', "text": None, "weight": None}
    assert normal(record) == Conversation([USER, ASSISTANT], [{"name": "add"}], {}, None)


def test_an_assistant_may_only_reason_or_only_call():
    call = {"type": "function", "function": {"name": "now", "arguments": {}}}
    for turn in ({"reasoning_content": "hm"}, {"thinking": "hm"}, {"tool_calls": [call]}):
        assert messages_of({"messages": [USER, {"role": "assistant", **turn}]})[1] == {"role": "assistant", **turn}


@pytest.mark.parametrize(
    ("written", "expected"),
    [('{"city": "Oslo"}', {"city": "Oslo"}), ({"city": "Oslo"}, {"city": "Oslo"}), ("", {}), (None, {})],
)
def test_arguments_become_a_dictionary(written: Any, expected: dict[str, Any]):
    nested = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": written}}
    flat = {"name": "weather", "arguments": written}
    calls = messages_of({"messages": [USER, {"role": "assistant", "tool_calls": [nested, flat]}]})[1]["tool_calls"]
    assert calls == [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": expected}},
        {"name": "weather", "arguments": expected},
    ]


def test_prompt_and_completion_as_strings():
    assert normal({"prompt": "2+2=", "completion": "4", "weight": 0.5}) == Completion("2+2=", "4", 0.5)
    assert normal({"prompt": "", "completion": "4"}) == Completion("", "4", None)


def test_of_two_message_lists_only_the_completion_trains():
    earlier = {"role": "assistant", "content": "hi", "train": True}
    kept_out = {"role": "assistant", "content": "so...", "train": False}
    assert messages_of({"prompt": [USER, earlier, USER], "completion": [kept_out, ASSISTANT]}) == [
        {"role": "user", "content": "2+2?", "train": False},
        {"role": "assistant", "content": "hi", "train": False},
        {"role": "user", "content": "2+2?", "train": False},
        {"role": "assistant", "content": "so...", "train": False},
        {"role": "assistant", "content": "4"},
    ]


def test_a_prompt_without_a_completion_does_not_compete_with_messages():
    assert messages_of({"prompt": "2+2?", "prompt_id": "x", "messages": [USER, ASSISTANT]}) == [USER, ASSISTANT]


def test_text():
    assert normal({"text": "Once upon a time"}) == Text("Once upon a time", None)


def test_sharegpt():
    record = {
        "system": "Use tools.",
        "tools": "[]",
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
            {"from": "observation", "value": "rain"},
            {"from": "gpt", "value": "It rains.", "train": True},
        ],
    }
    assert normal(record) == Conversation(
        [
            {"role": "system", "content": "Use tools."},
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": {"city": "Oslo"}}]},
            {"role": "tool", "content": "rain"},
            {"role": "assistant", "content": "It rains.", "train": True},
        ]
    )


def test_sharegpt_column_with_messages_in_it():
    assert messages_of({"conversations": [USER, ASSISTANT]}) == [USER, ASSISTANT]


def test_alpaca():
    record = {
        "instruction": "Add.",
        "input": "2 and 2",
        "output": "4",
        "history": [["Hi", "Hello"]],
        "system": "Short.",
    }
    assert messages_of(record) == [
        {"role": "system", "content": "Short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Add.\n\n2 and 2"},
        {"role": "assistant", "content": "4"},
    ]
    assert messages_of({"instruction": "Add.", "input": "", "output": "4"})[0] == {"role": "user", "content": "Add."}


def with_assistant(**turn: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", **turn}]}


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    # formats
    (
        {"question": "2+2?", "answer": "4"},
        "unknown format: the row has question, answer; accepted are messages",
        "columns:",
    ),
    ({"user": "7", "events": []}, "a row of the kind history", "renderer: {type: events}"),
    ({}, "unknown format: the row has no columns", "columns:"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "the row has prompt, chosen, rejected", "{type: preference}"),
    (
        {"messages": [USER, ASSISTANT], "text": "2+2? 4"},
        "in 2 formats at once: messages | text",
        "`columns: {text: unused}`",
    ),
    (
        {"prompt": [USER], "completion": "4"},
        "prompt is a list, completion is a str",
        "both as strings, or both as lists",
    ),
    ({"prompt": "2+2=", "completion": ""}, "completion: is empty", "remove the row"),
    ({"prompt": [USER], "completion": [USER]}, "completion: holds no assistant turn", ""),
    ({"text": ""}, "text: is empty", "remove the row"),
    ({"text": ["a"]}, "text: ['a'] is not a string", "one string"),
    # messages
    ({"messages": []}, "messages: [] is not a list of messages", '{"role"'),
    ({"messages": "hi"}, "messages: 'hi' is not a list of messages", '{"role"'),
    ({"messages": ["hi"]}, "messages[0]: 'hi' is not a message", '{"role"'),
    (
        {"messages": [{"role": "assistent", "content": "4"}]},
        "messages[0].role: unknown role 'assistent'",
        "'assistant'?",
    ),
    ({"messages": [{"role": "human", "content": "4"}]}, "messages[0].role: unknown role 'human'", "'user'?"),
    (
        {"messages": [{"role": "function", "content": "4"}]},
        "one of: system, developer, user, assistant, tool",
        "'tool'?",
    ),
    ({"messages": [{"from": "human", "value": "4"}]}, "messages[0].role: is missing", "column `conversations`"),
    ({"messages": [USER]}, "the conversation has no assistant turn", "remove the row"),
    ({"messages": [{"role": "user"}, ASSISTANT]}, "messages[0]: the user turn has no content", ""),
    ({"messages": [{**USER, "train": True}, ASSISTANT]}, "messages[0].train: on a user turn", "remove the key"),
    ({"messages": [{**USER, "tool_calls": [{}]}, ASSISTANT]}, "messages[0].tool_calls: on a user turn", ""),
    (
        {"messages": [{"role": "user", "content": 4}, ASSISTANT]},
        "messages[0].content: 4 is not a string",
        '"type": "text"',
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, ASSISTANT]},
        "messages[0].content[0]: {'type': 'image', 'url': 'x'} is not a text part",
        "only text",
    ),
    (
        {"messages": [{"role": "user", "content": "cut \ud83d"}, ASSISTANT]},
        "messages[0].content: character 4 is half",
        "emoji",
    ),
    # the assistant's turn
    (with_assistant(), "messages[1]: empty assistant turn", "say nothing"),
    (with_assistant(content=""), "messages[1]: empty assistant turn", "say nothing"),
    (with_assistant(content=" \n"), "messages[1]: empty assistant turn", "say nothing"),
    (with_assistant(content=[{"type": "text", "text": ""}], tool_calls=[]), "messages[1]: empty assistant turn", ""),
    (with_assistant(content="4", train="no"), "messages[1].train: 'no' is neither true nor false", ""),
    (with_assistant(content="4", reasoning_content=["a"]), "messages[1].reasoning_content: ['a'] is not a string", ""),
    (with_assistant(tool_calls={"name": "f"}), "messages[1].tool_calls: {'name': 'f'} is not a list", '"function"'),
    (with_assistant(tool_calls=["f"]), "messages[1].tool_calls[0]: 'f' is not a tool call", '"function"'),
    (
        with_assistant(tool_calls=[{"arguments": {}}]),
        "messages[1].tool_calls[0]: {'arguments': {}} names no function",
        "",
    ),
    (
        with_assistant(tool_calls=[{"name": "f", "arguments": "{city"}]),
        "messages[1].tool_calls[0].arguments: '{city' is not JSON: Expecting property name",
        "valid JSON",
    ),
    (with_assistant(tool_calls=[{"name": "f", "arguments": "[1]"}]), "arguments: [1] is not an object", ""),
    # beside the turns
    ({"messages": [USER, ASSISTANT], "tools": {"name": "f"}}, "tools: {'name': 'f'} is not a list of tools", ""),
    ({"messages": [USER, ASSISTANT], "tools": "[{"}, "tools: '[{' is not JSON", ""),
    ({"messages": [USER, ASSISTANT], "chat_template_kwargs": [1]}, "chat_template_kwargs: [1] is not an object", ""),
    ({"text": "a", "weight": "high"}, "weight: 'high' is not a weight", "`columns: {weight: unused}`"),
    ({"text": "a", "weight": -1.0}, "weight: -1.0 is not a weight", ""),
    ({"text": "a", "weight": math.nan}, "weight: nan is not a weight", ""),
    ({"text": "a", "weight": True}, "weight: True is not a weight", ""),
    # ShareGPT and Alpaca
    ({"conversations": []}, "conversations: [] is not a list of turns", '"from"'),
    ({"conversations": [{"from": "human"}]}, "conversations[0]: {'from': 'human'} is not a turn", '"from"'),
    ({"conversations": [{"from": "bot", "value": "x"}]}, "conversations[0].from: unknown role 'bot'", ""),
    ({"conversations": [{"from": "humen", "value": "x"}]}, "conversations[0].from: unknown role 'humen'", "'human'?"),
    ({"conversations": [{"from": "function_call", "value": "f()"}]}, "conversations[0].value: 'f()' is not JSON", ""),
    ({"instruction": "Add.", "output": ""}, "turns[1]: empty assistant turn", ""),
    ({"instruction": 4, "output": "4"}, "turns[0].content: 4 is not a string", ""),
    ({"instruction": "a", "output": "b", "history": ["c"]}, "history: 'c' is not a pair", "[question, answer]"),
]


@pytest.mark.parametrize(("record", "reason", "cure"), REFUSED, ids=[reason for _, reason, _ in REFUSED])
def test_refusals(record: dict[str, Any], reason: str, cure: str):
    error = refusal(record)
    assert reason in error.reason
    assert cure in error.cure


def test_long_values_are_shown_short():
    error = refusal({"messages": "x" * 10_000})
    assert len(error.reason) < 120
