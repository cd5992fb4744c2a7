"""The template process: renders conversations, locates masks and continues dialogues where a template can be killed.

A chat template is a program that came with a model. jinja2's sandbox keeps it from attributes and imports, not from
looping or allocating without end; a process of its own with limits on memory and processor time does. Started by
`sandbox.py`, ends with its standard input. Imports jinja2 and the standard library only: it starts in 0.3 s.
"""

from __future__ import annotations

import marshal
import resource
import signal
import sys
import time
from typing import Any, BinaryIO

from burnish.data.rendering.ask import ask, between, probe_turns, stops
from burnish.data.rendering.locate import locate, said
from burnish.data.rendering.marker import Anchors, Refused
from burnish.data.rendering.probe import learn, report
from burnish.data.rendering.template import ChatTemplate

MEMORY_BYTES = 1 << 30
CPU_SECONDS = 2
"""For one request: 32 conversations take 2 ms."""
HEADER = 8


class _Live:
    """One template, ready."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._template = ChatTemplate(spec["source"], spec["variables"], spec["today"])
        self._specials: list[str] = spec["specials"]
        self._anchors: dict[str, Anchors] = {}
        self.report = report(self._template, self._anchors_for({}), {})

    def _anchors_for(self, extra: dict[str, Any]) -> Anchors:
        key = repr(sorted(extra.items())) if extra else ""
        if key not in self._anchors:
            if len(self._anchors) >= 256:
                self._anchors.clear()
            self._anchors[key] = learn(self._template, self._specials, extra)
        return self._anchors[key]

    def locate(self, conversation: bytes) -> tuple[str, list[tuple[int, int]]]:
        """(text, trained characters)"""
        messages, tools, extra = marshal.loads(conversation)
        text, turns = locate(self._template, self._anchors_for(extra), messages, tools, extra)
        return text, [span for turn in turns if messages[turn.message].get("train", True) for span in turn.spans]

    def ask(self, conversation: bytes) -> tuple[str]:
        """The prompt that the conversation is."""
        messages, tools, extra = marshal.loads(conversation)
        return (ask(self._template, self._anchors_for(extra), messages, tools, extra),)

    def between(self, dialogue: bytes) -> tuple[str, int]:
        """What follows a sampled turn, see `ask.between`."""
        prompt, turns, tools, extra = marshal.loads(dialogue)
        return between(self._template, self._anchors_for(extra), prompt, turns, tools, extra)

    def dialogue(self, _: bytes) -> tuple[list[str], str]:
        """(what ends a turn, why no dialogue of several turns can be led or nothing)"""
        anchors = self._anchors_for({})
        return stops(self._template, anchors), probe_turns(self._template, anchors)

    def answer(self, what: str, record: bytes) -> tuple[Any, ...]:
        """What the method `what` says of a record, or (None, reason, cure)."""
        try:
            return getattr(self, what)(record)
        except Refused as refused:
            return None, refused.reason, refused.cure
        except Exception as error:  # of the template: it may do anything, and the other rows still want their answer
            return None, f"{_FAILED[what]}: {said(error)}", "look at the template, or shorten the row"


_FAILED = {
    "locate": "the loss mask cannot be located",
    "ask": "the prompt cannot be rendered",
    "between": "the dialogue cannot be continued",
    "dialogue": "the template cannot be tried",
}


def main() -> None:
    """Answers requests on standard input until it ends. The first is the template: answered by its report."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the run decides when it ends
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    spec = _read(requests)
    if spec is None:
        return
    _allow_seconds()
    try:
        live = _Live(spec)
    except Refused as refused:
        return _write(answers, (None, refused.reason, refused.cure))
    except Exception as error:
        return _write(answers, (None, f"the chat template cannot be used: {said(error)}", "check its syntax"))
    _write(answers, live.report.to_dict())
    while (request := _read(requests)) is not None:
        _allow_seconds()
        what, records = request
        _write(answers, [live.answer(what, record) for record in records])


def _allow_seconds() -> None:
    limit = int(time.process_time()) + 1 + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def _read(stream: BinaryIO) -> Any:
    header = stream.read(HEADER)
    if len(header) < HEADER:
        return None
    return marshal.loads(stream.read(int.from_bytes(header, "little")))


def _write(stream: BinaryIO, value: Any) -> None:
    payload = marshal.dumps(value)
    stream.write(len(payload).to_bytes(HEADER, "little") + payload)
    stream.flush()


if __name__ == "__main__":
    main()
