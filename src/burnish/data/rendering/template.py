"""A chat template as transformers runs it: the same jinja2 environment, and marks that survive rendering.

Runs inside the template process (`worker.py`): imports jinja2 and the standard library only. Knows nothing of tokens.

A *mark* is two characters: U+FDD0, a noncharacter that no text may contain, and a character that says which mark it is.
Put around a message's content, marks come out of the render wherever the content does; taken out again they must leave
the text of the plain render, and then their places are exact.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any, cast

from jinja2 import TemplateError, ext, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

MARK = "\ufdd0"
_FIRST = 0xE000
"""Mark ids are written as characters from here on: 6,400 private-use ones, then those of plane 15."""
TAG_OPEN, TAG_CLOSE = 0, 1
_MAX_CHARS = 20_000_000

Marks = list[tuple[int, int]]
"""(mark id, its position in the text without marks), in order of position."""


def mark(mark_id: int) -> str:
    """The two characters of a mark.

    >>> mark(2) == MARK + chr(0xE002)
    True
    """
    return MARK + chr(_FIRST + mark_id if mark_id < 6400 else 0xF0000 + mark_id)


def take_marks(rendered: str) -> tuple[str, Marks]:
    """The text without its marks, and where they stood.

    >>> take_marks("ab" + mark(5) + "cd")
    ('abcd', [(5, 2)])
    """
    parts = rendered.split(MARK)
    marks: Marks = []
    position = len(parts[0])
    for i in range(1, len(parts)):
        code, parts[i] = ord(parts[i][0]), parts[i][1:]
        marks.append((code - _FIRST if code < 0xF0000 else code - 0xF0000, position))
        position += len(parts[i])
    return "".join(parts), marks


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: the author's word on what the model writes. Marked when asked for."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_wrap"), [], [], body).set_lineno(line)

    def _wrap(self, caller: Callable[[], str]) -> str:
        text = caller()
        if not cast(_Environment, self.environment).marking:
            return text
        return mark(TAG_OPEN) + text + mark(TAG_CLOSE)


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment, with a short way to `loop.first` and its kin, which need no safety check."""

    marking = False

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is LoopContext and attribute in _LOOP:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)


_LOOP = frozenset({"first", "last", "index", "index0", "length", "revindex", "revindex0", "previtem", "nextitem"})


class ChatTemplate:
    """A compiled template. `render` equals `tokenizer.apply_chat_template(..., tokenize=False)`.

    `variables` are what the template sees besides the conversation: the special tokens by name and the recipe's
    `chat_template_kwargs`. `strftime_now` always answers with `today`: a run resumed tomorrow renders the same text.
    """

    def __init__(self, source: str, variables: dict[str, Any], today: str) -> None:
        self.source, self.variables = source, variables
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = datetime.fromisoformat(today).strftime
        self._environment = environment
        self._template = environment.from_string(source)
        self._globals = {**environment.globals, **variables, "documents": None}
        self.thought_tags = tuple(dict.fromkeys(re.findall(r"</?\w*:?think\w*>|\[/?THINK\]", source)))
        """Tags of inline reasoning that the template knows and may cut at: `<think>`, `</think>`."""
        self.has_tags = any(
            isinstance(block.call.node, nodes.ExtensionAttribute)
            for block in environment.parse(source).find_all(nodes.CallBlock)
        )

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        extra: dict[str, Any],
        *,
        prompt: bool = False,
        marking: bool = False,
    ) -> str:
        """Text of a conversation; `prompt` adds the generation prompt, `marking` marks the generation tags.

        Raises:
            Exception: whatever the template raises: it is somebody's program.
        """
        self._environment.marking = marking
        # `Template.render` goes through a chain of dictionaries key by key: 14 us of the 25 that a short chat took.
        names = {**self._globals, **extra, "messages": messages, "tools": tools, "add_generation_prompt": prompt}
        compiled = self._template
        context = self._environment.context_class(self._environment, names, compiled.name, compiled.blocks)
        text = "".join(compiled.root_render_func(context))
        if len(text) > _MAX_CHARS:
            raise TemplateError(f"it writes more than {_MAX_CHARS:,} characters")
        return text


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own filter, `<` stays `<`: a prompt is not a web page."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
