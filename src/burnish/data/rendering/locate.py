"""Which characters of a rendered conversation the model is to write: the mask, by characters, with a proof.

Two locators. *Tags*: the template says it itself with `{% generation %}`. *Counterfactual*: the conversation is
rendered a second time with marks around every message's content; the second text without its marks must be the first,
character by character, so the template did not look at the marks and their places hold. No template needs changing, and
no prefix of a conversation needs to render like its beginning. Where both speak they must agree on the contents.

Around the content the model also writes what the template adds: from the end of the generation prompt (so `<think>` or
`<tool_call>` are trained) to the end-of-turn token. Both are learnt from probes (`probe.py`).

Runs inside the template process; pure.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import takewhile
from typing import Any, NamedTuple

from burnish.data.rendering.marker import (
    CALL,
    FIRST_STRING,
    KINDS,
    THOUGHT,
    Anchors,
    Marker,
    Message,
    Refused,
    as_parts,
)
from burnish.data.rendering.template import MARK, TAG_CLOSE, TAG_OPEN, ChatTemplate, Marks, take_marks

Span = tuple[int, int]

_TAG_IT = "mark what the model writes in the template with {% generation %} ... {% endgeneration %}"


class Turn(NamedTuple):
    """One assistant message in the text: `spans` are trained, `core` reaches from its first content to its last."""

    message: int
    core: Span
    spans: tuple[Span, ...]
    ended: bool
    """An end-of-turn token follows it."""


def locate(
    template: ChatTemplate,
    anchors: Anchors,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    extra: dict[str, Any],
) -> tuple[str, list[Turn]]:
    """The text of a conversation and its assistant turns, in order.

    Raises:
        Refused: the template refuses the conversation, does not render part of it, or the mask cannot be proved.
    """
    messages = [_untrained(message) if "train" in message else message for message in messages]
    if anchors.parts:
        messages = [as_parts(message) for message in messages]
    try:
        text = template.render(messages, tools, extra)
    except Exception as error:
        raise Refused(
            f"the chat template refuses this conversation: {said(error)}",
            "change the conversation, or the template with `renderer.chat_template_path`",
        ) from error
    if MARK in text:
        raise Refused(f"the text holds the noncharacter U+{ord(MARK):04X}", "remove it: no text may contain it")
    failure = ""
    for everything in (True, False):
        marker = Marker(template, anchors, everything)
        marked = marker.messages(messages)
        try:
            rendered = template.render(marked, tools, extra, marking=True)
        except Exception as error:
            failure = f"with marks around the contents the template says: {said(error)}"
            continue
        plain, marks = take_marks(rendered)
        if plain != text:
            failure = f"marks around the contents change the text: {difference(text, plain)}"
            continue
        _check_rendered(messages, marker.strings, marks)
        return text, _turns(text, marks, marker.strings, messages, anchors)
    if template.has_tags:
        plain, marks = take_marks(template.render(messages, tools, extra, marking=True))
        if plain == text:
            return text, _tagged_turns(text, marks, messages, anchors)
    raise Refused(f"the loss mask cannot be proved: {failure}", _TAG_IT)


def _untrained(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "train"}


def _check_rendered(messages: list[Message], strings: list[tuple[int, int]], marks: Marks) -> None:
    """Nothing may be dropped silently, but thoughts of earlier turns, which reasoning templates drop by design."""
    seen = {mark_id for mark_id, _ in marks if mark_id >= FIRST_STRING}
    if len(seen) == 2 * len(strings):
        return
    last = next((i for i in reversed(range(len(messages))) if messages[i]["role"] in ("assistant", "user")), -1)
    missing, thought_of = [], set()
    for k, (index, kind) in enumerate(strings):
        if not seen.issuperset((FIRST_STRING + 2 * k, FIRST_STRING + 2 * k + 1)):
            missing.append((index, kind))
        elif kind == THOUGHT:
            thought_of.add(index)
    for index, kind in missing:
        # Of `reasoning_content` and `thinking`, which many data sets carry both, a template reads one.
        if kind == THOUGHT and (index != last or index in thought_of):
            continue
        raise Refused(
            f"the chat template does not render the {KINDS[kind]} of messages[{index}] ({messages[index]['role']})",
            "use a template that does (`renderer.chat_template_path`), or write it into the content, or remove it",
        )


def _contents(marks: Marks, strings: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(message, first mark's place, last mark's place), in order of the text. Gemma 4 cuts a message in two."""
    contents: list[tuple[int, int, int]] = []
    seen: set[int] = set()
    for mark_id, position in marks:
        message, kind = strings[(mark_id - FIRST_STRING) // 2]
        if mark_id in seen:
            if kind == CALL:  # a call's name comes again in the header of its result (gpt-oss): the first time counts
                continue
            raise Refused("the loss mask cannot be proved: the template renders a content twice", _TAG_IT)
        seen.add(mark_id)
        if contents and contents[-1][0] == message:
            contents[-1] = (message, contents[-1][1], position)
        else:
            contents.append((message, position, position))
    return contents


def _turns(
    text: str, marks: Marks, strings: list[tuple[int, int]], messages: list[Message], anchors: Anchors
) -> list[Turn]:
    """Assistant turns from marks; tags, where the template has some, must agree and decide where a turn begins."""
    tags = _tags(marks) if any(mark_id < FIRST_STRING for mark_id, _ in marks) else []
    contents = _contents([m for m in marks if m[0] >= FIRST_STRING] if tags else marks, strings)
    if tags:
        _check_agreement(text, tags, marks, strings, messages)
    turns = []
    for i, (message, first, last) in enumerate(contents):
        if messages[message]["role"] != "assistant":
            continue
        before = contents[i - 1][2] if i else 0
        after = contents[i + 1][1] if i + 1 < len(contents) else len(text)
        start = _after_prompt(text, before, first, anchors)
        end = _end_of_turn(text, last, after, anchors)
        spans = ((start, end or last),)
        if tags:
            spans = _tagged_spans(text, (first, last), [t for t in tags if t[0] < after and t[1] > before], end)
        turns.append(Turn(message, (first, last), spans, end is not None))
    return turns


def _after_prompt(text: str, start: int, stop: int, anchors: Anchors) -> int:
    """Where the model begins to write, at `stop` at the latest: behind the generation prompt, or behind as much of it
    as stands there (of `<|im_start|>assistant\\n<think>\\n`, earlier turns may have no `<think>`).
    """
    prompt = anchors.prompt
    if prompt and (at := text.rfind(prompt, start, stop)) >= 0:
        return at + len(prompt)
    special = anchors.specials.match(prompt)
    if special is None or (at := text.rfind(special.group(), start, stop)) < 0:
        return stop
    return at + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, text[at:stop], strict=False)))


def _end_of_turn(text: str, start: int, stop: int, anchors: Anchors) -> int | None:
    """End of the token that ends the turn whose content ends at `start`, before the next content at `stop`."""
    found = [at + len(end) for end in anchors.ends if (at := text.find(end, start, stop)) >= 0]
    if found:
        return min(found)
    special = anchors.specials.search(text, start, stop)
    return special.end() if special and special.group() not in anchors.prompt else None


def _tags(marks: Marks) -> list[Span]:
    opened = [position for mark_id, position in marks if mark_id == TAG_OPEN]
    closed = [position for mark_id, position in marks if mark_id == TAG_CLOSE]
    if len(opened) != len(closed):
        raise Refused("the loss mask cannot be proved: the template cuts through its {% generation %} tags", _TAG_IT)
    return list(zip(opened, closed, strict=True))


def _check_agreement(
    text: str, tags: list[Span], marks: Marks, strings: list[tuple[int, int]], messages: list[Message]
) -> None:
    """Tags must hold every character that an assistant message brought, and none that another message brought."""
    places: dict[int, list[int]] = {}
    for mark_id, position in marks:
        if mark_id >= FIRST_STRING:
            places.setdefault((mark_id - FIRST_STRING) // 2, []).append(position)
    ends = [end for _, end in tags]
    for k, (start, *rest) in places.items():
        index = strings[k][0]
        end = rest[0] if rest else start
        at, tag = start, bisect_right(ends, start)
        if messages[index]["role"] != "assistant":
            at, wrong = (max(start, tags[tag][0]), "hold") if tag < len(tags) else (end, "")
            end = min(end, tags[tag][1]) if at < end else at
        else:
            while tag < len(tags) and tags[tag][0] <= at < end:
                at, tag = tags[tag][1], tag + 1
            wrong = "leave out"
        if at < end:
            raise Refused(
                f"the two mask locators disagree: the {{% generation %}} tags {wrong} {text[at:end][:40]!r} of "
                f"messages[{index}] ({messages[index]['role']})",
                "correct the tags in the template, or remove them all: the mask is then located without them",
            )


def _tagged_spans(text: str, core: Span, tags: list[Span], end: int | None) -> tuple[Span, ...]:
    """The tags of one turn; the last one is made to end with the end-of-turn token, and not with white space."""
    own = [(start, stop) for start, stop in tags if start <= core[1] and stop >= core[0]]
    if not own:
        raise Refused("the loss mask cannot be proved: a turn has no {% generation %} tag", _TAG_IT)
    start, stop = own[-1]
    return (*own[:-1], (start, end or start + len(text[start:stop].rstrip())))


def _tagged_turns(text: str, marks: Marks, messages: list[Message], anchors: Anchors) -> list[Turn]:
    """Assistant turns from tags alone: one tag a turn, or several where nobody asks which turn is which."""
    tags = _tags(marks)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if len(tags) != len(turns):
        raise Refused(
            f"the loss mask cannot be proved: {len(tags)} {{% generation %}} tags for {len(turns)} assistant turns",
            "put one {% generation %} ... {% endgeneration %} around each assistant turn",
        )
    located = []
    for i, (message, (start, end)) in enumerate(zip(turns, tags, strict=True)):
        stop = start + len(text[start:end].rstrip())
        ended = text.endswith(anchors.ends, start, stop) if anchors.ends else False
        if not ended:
            after = tags[i + 1][0] if i + 1 < len(tags) else len(text)
            token = next((t for t in anchors.ends if text.startswith(t, stop) and stop + len(t) <= after), "")
            stop, ended = stop + len(token), bool(token)
        located.append(Turn(message, (start, stop), ((start, stop),), ended))
    return located


def difference(text: str, other: str) -> str:
    """Where two texts part, in words."""
    at = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return f"{text[max(0, at - 10) : at + 30]!r} becomes {other[max(0, at - 10) : at + 30]!r}"


def said(error: Exception) -> str:
    """What an exception says, in one line."""
    if isinstance(error, MemoryError):
        return "it needs too much memory"
    if isinstance(error, RecursionError):
        return "it calls itself without end"
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
