"""What a row says, whatever format it is written in: a conversation, a prompt with its completion, or plain text.

Accepted: `messages`; `prompt` with `completion` (both strings, or both lists of messages); `text`; ShareGPT's
`conversations`; Alpaca's `instruction` (`input`) and `output`. A row may add `tools`, `chat_template_kwargs`, `weight`.

Runs for every row: plain dictionaries, no pydantic. Knows no template and no tokenizer; never changes the row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from burnish.data.messages import (
    DROP_ROW,
    SHAREGPT_ROLES,
    Message,
    Refused,
    check_text,
    checked_messages,
    parsed,
    shown,
    unknown_role,
)
from burnish.errors import DataError
from burnish.types import Row


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns for a chat template.

    A message is a new dictionary with `role`, mostly `content`, and whatever else the template may read; null fields
    are gone, tool calls have their arguments as a dictionary. `train: False` on a message: it is context only.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A string and what is to follow it; only the second is trained."""

    prompt: str
    completion: str
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """All of it is trained."""

    text: str
    weight: float | None = None


def conversation(row: Row) -> Conversation | Completion | Text:
    """What `row` says.

    Raises:
        DataError: at `row.where`, with the reason, the turn it concerns and a cure.
    """
    try:
        keys = _keys_of_format(row.record)
        return _FORMATS[keys](row.record)
    except Refused as refused:
        raise DataError(refused.reason, row.where, refused.cure) from None


def _keys_of_format(record: dict[str, Any]) -> tuple[str, ...]:
    present = {key for key, value in record.items() if value is not None}
    found = [keys for keys in _FORMATS if present.issuperset(keys)]
    if len(found) == 1:
        return found[0]
    if found:
        names = " | ".join(" and ".join(keys) for keys in found)
        cure = f"rename one of them away in the source: `columns: {{{found[-1][0]}: unused}}`"
        raise Refused(f"the row is in {len(found)} formats at once: {names}", cure)
    accepted = " | ".join(" and ".join(keys) for keys in _FORMATS)
    has = ", ".join(record) or "no columns"
    cure = "rename the columns in the source: `columns: {question: prompt, answer: completion}`"
    raise Refused(f"unknown format: the row has {has}; accepted are {accepted}", cure)


def _from_messages(record: dict[str, Any]) -> Conversation:
    return _conversation(record, checked_messages(record["messages"], "messages"))


def _from_completion(record: dict[str, Any]) -> Conversation | Completion:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        context = checked_messages(prompt, "prompt")
        for message in context:
            message["train"] = False
        said = checked_messages(completion, "completion")
        if all(message["role"] != "assistant" for message in said):
            raise Refused("completion: holds no assistant turn", "the completion is what the assistant is to say")
        return _conversation(record, context + said)
    if not isinstance(prompt, str) or not isinstance(completion, str):
        kinds = f"prompt is a {type(prompt).__name__}, completion is a {type(completion).__name__}"
        raise Refused(kinds, "write both as strings, or both as lists of messages")
    if not completion:
        raise Refused("completion: is empty", DROP_ROW)
    check_text(prompt, "prompt")
    check_text(completion, "completion")
    return Completion(prompt, completion, _weight(record))


def _from_text(record: dict[str, Any]) -> Text:
    text = record["text"]
    if not isinstance(text, str):
        raise Refused(f"text: {shown(text)} is not a string", "write the document as one string")
    if not text:
        raise Refused("text: is empty", DROP_ROW)
    check_text(text, "text")
    return Text(text, _weight(record))


def _from_sharegpt(record: dict[str, Any]) -> Conversation:
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns:
        raise Refused(f"conversations: {shown(turns)} is not a list of turns", _TURN)
    if isinstance(turns[0], dict) and "role" in turns[0]:  # as common on the hub as ShareGPT's own keys
        return _conversation(record, checked_messages(turns, "conversations"))
    messages = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise Refused(f"conversations[{index}]: {shown(turn)} is not a turn", _TURN)
        speaker = turn.get("from")
        if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            raise unknown_role(f"conversations[{index}].from", speaker, tuple(SHAREGPT_ROLES))
        message = {"role": SHAREGPT_ROLES[speaker], "content": turn["value"], "train": turn.get("train")}
        if speaker == "function_call":
            calls = parsed(message.pop("content"), f"conversations[{index}].value")
            message["tool_calls"] = calls if isinstance(calls, list) else [calls]
        messages.append(message)
    checked = checked_messages(messages, "conversations")
    return _conversation(record, _system(record) + checked)


_TURN = 'a turn is {"from": "human", "value": "..."}'


def _from_alpaca(record: dict[str, Any]) -> Conversation:
    asked = record["instruction"]
    if record.get("input"):
        asked = f"{asked}\n\n{record['input']}"
    messages = []
    for pair in record.get("history") or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Refused(f"history: {shown(pair)} is not a pair", "write earlier turns as [question, answer]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": record["output"]}]
    return _conversation(record, _system(record) + checked_messages(messages, "turns"))


_FORMATS = {
    ("messages",): _from_messages,
    ("prompt", "completion"): _from_completion,
    ("text",): _from_text,
    ("conversations",): _from_sharegpt,
    ("instruction", "output"): _from_alpaca,
}


def _system(record: dict[str, Any]) -> list[Message]:
    """ShareGPT and Alpaca rows may say the system prompt in a column of its own."""
    if not record.get("system"):
        return []
    return checked_messages([{"role": "system", "content": record["system"]}], "system")


def _conversation(record: dict[str, Any], messages: list[Message]) -> Conversation:
    if all(message["role"] != "assistant" for message in messages):
        raise Refused("the conversation has no assistant turn, so nothing can be trained", "remove the row")
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = parsed(tools, "tools") if tools.strip() else None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Refused(f"tools: {shown(tools)} is not a list of tools", "a tool is a JSON schema, or JSON text of one")
    kwargs = record.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise Refused(f"chat_template_kwargs: {shown(kwargs)} is not an object", "write {name: value}")
    return Conversation(messages, tools or None, dict(kwargs or {}), _weight(record))


def _weight(record: dict[str, Any]) -> float | None:
    weight = record.get("weight")
    if weight is None:
        return None
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not isfinite(weight) or weight < 0:
        cure = "write a number, or rename the column: `columns: {weight: unused}`"
        raise Refused(f"weight: {shown(weight)} is not a weight: a number of at least 0", cure)
    return float(weight)
