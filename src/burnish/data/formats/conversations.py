"""Rows to imitate: a conversation, a prompt with its completion, or plain text.

Accepted: `messages`; `prompt` with `completion` (both strings, or both lists of messages); `text`; ShareGPT's
`conversations`; Alpaca's `instruction` (`input`) and `output`. A row may add `tools`, `chat_template_kwargs`, `weight`.

Knows no template and no tokenizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from burnish.data.formats.base import (
    Completion,
    Conversation,
    Part,
    Text,
    as_conversation,
    has_assistant,
    prompted,
    text_of,
    weight_of,
    wrong_kind,
)
from burnish.data.messages import SHAREGPT_ROLES, Message, Refused, checked_messages, parsed, shown, unknown_role

if TYPE_CHECKING:
    from burnish.types import RowFormat


def parts(record: dict[str, Any], _: RowFormat) -> list[Part]:
    """One document, of which something is trained."""
    content = said(record)
    if isinstance(content, Conversation) and not has_assistant(content.messages):
        raise Refused("the conversation has no assistant turn, so nothing can be trained", "remove the row")
    if record.get("label") is False or record.get("kto_tag") is False:
        cure = "`workflow: {type: preference, loss: {type: kto}}`, or rename the column: `columns: {label: unused}`"
        raise Refused("label: false: the answer is marked bad, and would be imitated", cure)
    return [Part(content)]


def said(record: dict[str, Any]) -> Conversation | Completion | Text:
    """What the row says, whatever it is written in."""
    return _FORMATS[_keys_of_format(record)](record)


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
    raise wrong_kind(record, "conversation", accepted)


def _from_messages(record: dict[str, Any]) -> Conversation:
    return as_conversation(record, checked_messages(record["messages"], "messages"))


def _from_completion(record: dict[str, Any]) -> Conversation | Completion:
    return prompted(record, "completion")


def _from_text(record: dict[str, Any]) -> Text:
    return Text(text_of(record["text"], "text"), weight_of(record))


def _from_sharegpt(record: dict[str, Any]) -> Conversation:
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns:
        raise Refused(f"conversations: {shown(turns)} is not a list of turns", _TURN)
    if isinstance(turns[0], dict) and "role" in turns[0]:  # as common on the hub as ShareGPT's own keys
        return as_conversation(record, checked_messages(turns, "conversations"))
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
    return as_conversation(record, _system(record) + checked)


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
    return as_conversation(record, _system(record) + checked_messages(messages, "turns"))


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
