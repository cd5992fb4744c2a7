"""Checks the messages of a conversation and brings their spellings to one, turn by turn.

Knows nothing of rows and files: a refusal says the turn (`messages[2].role`), and `formats.py` adds the row's place.
"""

from __future__ import annotations

import difflib
import json
from typing import Any

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
REASONING = ("reasoning_content", "thinking")
"""Where templates look for what an assistant thought: most in the first, gpt-oss and LFM2.5 in the second."""
DROP_ROW = "fill it in, or remove the row"


class Refused(Exception):
    """A refusal on its way to whoever knows the row's place."""

    def __init__(self, reason: str, cure: str) -> None:
        super().__init__(reason, cure)
        self.reason, self.cure = reason, cure


def checked_messages(messages: Any, place: str) -> list[Message]:
    """New message dictionaries, null fields dropped and the arguments of tool calls parsed.

    Raises:
        Refused: a turn that no template should be given; `place` is the column the messages stand in.
    """
    if not isinstance(messages, list) or not messages:
        raise Refused(
            f"{place}: {shown(messages)} is not a list of messages", 'a message is {"role": ..., "content": ...}'
        )
    return [_checked(message, place, index) for index, message in enumerate(messages)]


def _checked(message: Any, column: str, index: int) -> Message:
    if not isinstance(message, dict):
        cure = 'a message is {"role": "user", "content": "..."}'
        raise Refused(f"{column}[{index}]: {shown(message)} is not a message", cure)
    message = {key: value for key, value in message.items() if value is not None}
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise unknown_role(f"{column}[{index}].role", role, ROLES)
    if isinstance(content, str):
        if not content.isascii():
            check_text(content, f"{column}[{index}].content")
    elif isinstance(content, list):
        for number, part in enumerate(content):
            _check_part(part, f"{column}[{index}].content[{number}]")
    elif content is not None:
        reason = f"{column}[{index}].content: {shown(content)} is not a string"
        raise Refused(reason, 'write a string, or a list of {"type": "text", "text": "..."}')
    if role == "assistant":
        _check_assistant(message, f"{column}[{index}]")
    else:
        if content is None:
            raise Refused(f"{column}[{index}]: the {role} turn has no content", DROP_ROW)
        if message.get("tool_calls") or message.get("train"):
            key = "train" if message.get("train") else "tool_calls"
            raise Refused(f"{column}[{index}].{key}: on a {role} turn; only assistant turns have it", "remove the key")
    return message


def _check_assistant(message: Message, place: str) -> None:
    """Checks what only an assistant's turn has; parses the arguments of its tool calls in place."""
    if "tool_calls" in message:
        calls = message.pop("tool_calls")
        if not isinstance(calls, list):
            raise Refused(f"{place}.tool_calls: {shown(calls)} is not a list", _CALL)
        if calls:
            message["tool_calls"] = [_call(call, f"{place}.tool_calls[{n}]") for n, call in enumerate(calls)]
    if not isinstance(message.get("train", True), bool):
        raise Refused(f"{place}.train: {shown(message['train'])} is neither true nor false", "write true or false")
    thought = False
    for key in REASONING:
        if key in message:
            if not isinstance(message[key], str):
                raise Refused(
                    f"{place}.{key}: {shown(message[key])} is not a string", "write the reasoning as a string"
                )
            check_text(message[key], f"{place}.{key}")
            thought = thought or not _is_blank(message[key])
    if _is_blank(message.get("content")) and not thought and "tool_calls" not in message:
        reason = f"{place}: empty assistant turn: no content, no tool_calls, no reasoning_content"
        raise Refused(
            reason, "fill it in, or remove the turn or the row: training on it teaches the model to say nothing"
        )


def _is_blank(content: Any) -> bool:
    if isinstance(content, list):
        return all(_is_blank(part["text"]) for part in content)
    return not content or content.isspace()


def _check_part(part: Any, place: str) -> None:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        cure = 'only text can be trained on: {"type": "text", "text": "..."}'
        raise Refused(f"{place}: {shown(part)} is not a text part", cure)
    check_text(part["text"], f"{place}.text")


_CALL = 'a call is {"type": "function", "function": {"name": "...", "arguments": {...}}}'


def _call(call: Any, place: str) -> dict[str, Any]:
    """A copy with `arguments` as a dictionary: templates write them with `tojson`, which would quote a string again."""
    if not isinstance(call, dict):
        raise Refused(f"{place}: {shown(call)} is not a tool call", _CALL)
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise Refused(f"{place}: {shown(call)} names no function", _CALL)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parsed(arguments, f"{place}.arguments") if arguments.strip() else {}
    if arguments is not None and not isinstance(arguments, dict):
        raise Refused(f"{place}.arguments: {shown(arguments)} is not an object", _CALL)
    function = {**function, "arguments": arguments or {}}
    return {**call, "function": function} if "function" in call else function


def parsed(text: str, place: str) -> Any:
    """The JSON that a string holds: arguments, tools and calls are often stored that way."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{place}: {shown(text)} is not JSON: {error}", "write valid JSON") from error


def check_text(text: str, place: str) -> None:
    """Refuses half of a surrogate pair (JSON's "\\\\ud83d" alone): no tokenizer can encode it."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        reason = f"{place}: character {error.start} is half of a surrogate pair ({half}), which no tokenizer can encode"
        raise Refused(reason, "the text was cut inside an emoji or rare character: remove the half") from error


def unknown_role(place: str, role: Any, known: tuple[str, ...]) -> Refused:
    """The refusal of a role, with the one that was probably meant."""
    if role is None:
        cure = "ShareGPT's `from` and `value` belong into a column `conversations`" if known is ROLES else ""
        return Refused(f"{place}: is missing; one of: {', '.join(known)}", cure)
    near = difflib.get_close_matches(str(role), known, n=1)
    meant = near[0] if near else {**SHAREGPT_ROLES, "function": "tool", "model": "assistant"}.get(str(role))
    hint = f"did you mean '{meant}'?" if meant in known else ""
    return Refused(f"{place}: unknown role {shown(role)}; one of: {', '.join(known)}", hint)


def shown(value: Any) -> str:
    """A value as an error shows it: short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
