"""Marks around every content of a conversation, by which `locate.py` finds the contents in the rendered text again.

Runs inside the template process; pure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from burnish.data.rendering.template import ChatTemplate, mark

Message = dict[str, Any]

REASONING = ("reasoning_content", "reasoning", "thinking")
CONTENT, THOUGHT, CALL = range(3)
KINDS = ("content", "reasoning", "tool_calls")
FIRST_STRING = 2
"""Mark ids below belong to tags."""


class Refused(Exception):
    """This conversation cannot be trained with this template: reason and cure."""

    def __init__(self, reason: str, cure: str) -> None:
        super().__init__(reason, cure)
        self.reason, self.cure = reason, cure


@dataclass(frozen=True)
class Anchors:
    """What the template writes around an assistant turn."""

    prompt: str
    """The generation prompt, `<|im_start|>assistant\\n`: the model writes what follows it."""
    ends: tuple[str, ...]
    """Tokens that end a turn: `<|im_end|>`; gpt-oss has one for the last turn, one for others, one for tool calls."""
    specials: re.Pattern[str]
    """Any special token."""
    parts: bool = False
    """The template takes content as a list of parts, not as a string."""

    @cached_property
    def control(self) -> tuple[str, ...]:
        """Special tokens that make up turns: in a message they would forge one."""
        return tuple(dict.fromkeys(self.specials.findall("".join(self.ends) + self.prompt)))


def as_parts(message: Message) -> Message:
    """String content as a list of one text part, as serving engines do for templates that take lists.

    >>> as_parts({"role": "user", "content": "hi"})
    {'role': 'user', 'content': [{'type': 'text', 'text': 'hi'}]}
    """
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}] if content else []}


def refuse_forged(value: Any, index: int, control: Sequence[str]) -> None:
    """Raises Refused where a text in a part of message `index` is that of a token which makes up turns."""
    for text in _strings(value):
        for token in control:
            if token in text:
                raise Refused(
                    f"messages[{index}] holds the text of the control token {token}, which would forge a turn",
                    f"remove it, or break it up: {token[:2]} {token[2:]}",
                )


class Marker:
    """Puts marks into a conversation. `everything`: other roles' contents and the names of tools too, which tell
    template from content exactly; some templates compare those with something, so there is a second try without.

    String k has the marks 2 + 2 * k before and 3 + 2 * k after it; `strings[k]` says whose it is.
    """

    def __init__(self, template: ChatTemplate, anchors: Anchors, everything: bool) -> None:
        self._everything = everything
        self._control = anchors.control
        self._thought_tags = template.thought_tags
        self.strings: list[tuple[int, int]] = []
        """(message, kind)"""

    def messages(self, messages: list[Message]) -> list[Message]:
        return [self._message(i, message) for i, message in enumerate(messages)]

    def _message(self, index: int, message: Message) -> Message:
        content = message.get("content")
        self._check(content, index)
        marked = dict(message)
        if message["role"] != "assistant":
            if self._everything:
                marked["content"] = self._content(content, index, ())
            return marked
        if content:
            marked["content"] = self._content(content, index, self._thought_tags)
        for key in REASONING:
            if isinstance(message.get(key), str):
                self._check(message[key], index)
                marked[key] = self._wrapped(message[key], index, THOUGHT)
        if message.get("tool_calls"):
            self._check(message["tool_calls"], index)
            marked["tool_calls"] = [self._call(call, index) for call in message["tool_calls"]]
        return marked

    def _check(self, value: Any, index: int) -> None:
        refuse_forged(value, index, self._control)

    def _content(self, content: Any, index: int, tags: tuple[str, ...]) -> Any:
        if isinstance(content, str):
            for tag in tags:
                if tag in content:
                    return self._thoughtful(content, index)
            return self._wrapped(content, index, CONTENT)
        if isinstance(content, list):
            return [
                {**part, "text": self._wrapped(part["text"], index, CONTENT)}
                if isinstance(part, dict) and isinstance(part.get("text"), str)
                else part
                for part in content
            ]
        return content

    def _wrapped(self, text: str, index: int, kind: int) -> str:
        """Marks go inside the outer white space, so that a template that strips does the same with and without."""
        core = text.strip()
        if not core:
            return text
        first = FIRST_STRING + 2 * len(self.strings)
        self.strings.append((index, kind))
        if len(core) == len(text):
            return mark(first) + text + mark(first + 1)
        at = text.index(core)
        return text[:at] + mark(first) + core + mark(first + 1) + text[at + len(core) :]

    def _thoughtful(self, content: str, index: int) -> str:
        """`<think> a </think> b` -> `<think> [a] </think> {b}`, [] marks a thought, {} content: templates cut there."""
        pieces = re.split(f"({'|'.join(map(re.escape, self._thought_tags))})", content)
        for i in range(0, len(pieces), 2):
            thought = (i > 0 and not _closes(pieces[i - 1])) or (i + 1 < len(pieces) and _closes(pieces[i + 1]))
            pieces[i] = self._wrapped(pieces[i], index, THOUGHT if thought else CONTENT)
        return "".join(pieces)

    def _call(self, call: Any, index: int) -> Any:
        function = call.get("function", call)
        keys = ("name", "arguments") if self._everything else ("arguments",)
        marked = {**function, **{key: self._call_value(function[key], index) for key in keys if key in function}}
        return {**call, "function": marked} if "function" in call else marked

    def _call_value(self, value: Any, index: int) -> Any:
        if isinstance(value, str):
            return self._wrapped(value, index, CALL)
        if isinstance(value, dict):
            return {key: self._call_value(item, index) for key, item in value.items()}
        if isinstance(value, list):
            return [self._call_value(item, index) for item in value]
        return value


def _closes(tag: str) -> bool:
    return tag.startswith(("</", "[/"))


def _strings(value: Any) -> Sequence[str]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, dict):
        return [text for item in value.values() for text in _strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return ()
