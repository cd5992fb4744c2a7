"""Pairs: two answers to one prompt, of which the first is better.

Accepted: `prompt`, `chosen` and `rejected`, all strings or all lists of messages; `chosen` and `rejected` alone, whose
common beginning is the prompt; lists that begin with the prompt although it is given too (also as the user's string).
A row may add `margin` (by how much the chosen answer is better), `tools`, `chat_template_kwargs`, `weight`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from burnish.data.formats.base import (
    Completion,
    Conversation,
    Part,
    as_conversation,
    has_assistant,
    number,
    text_of,
    weight_of,
    wrong_kind,
)
from burnish.data.messages import DROP_ROW, Message, Refused, check_text, checked_messages, shown

if TYPE_CHECKING:
    from burnish.types import RowFormat

SIDES = ("chosen", "rejected")
_ONE_PROMPT = "chosen and rejected are two answers of the assistant to one prompt"


def parts(record: dict[str, Any], _: RowFormat) -> list[Part]:
    """The chosen answer, then the rejected one, each behind the prompt."""
    if all(record.get(side) is None for side in SIDES):
        raise wrong_kind(record, "preference", "chosen and rejected, mostly with prompt")
    for side in SIDES:
        if not record.get(side):
            state = "is missing" if record.get(side) is None else "is empty"
            raise Refused(f"{side}: {state}: a pair has two answers", DROP_ROW)
    margin = record.get("margin")
    margin = 0.0 if margin is None else number(margin, "margin")
    answers = _answers(record)
    if answers[0] == answers[1]:
        raise Refused("chosen and rejected are identical, so there is nothing to prefer", "remove the row")
    return [
        Part(content, {"preference": sign, "margin": margin}, side)
        for content, side, sign in zip(answers, SIDES, (1.0, -1.0), strict=True)
    ]


def _answers(record: dict[str, Any]) -> list[Completion] | list[Conversation]:
    chosen, rejected = record["chosen"], record["rejected"]
    prompt = record.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str | None):
        return _texts(prompt, chosen, rejected, weight_of(record))
    if isinstance(chosen, list) and isinstance(rejected, list) and isinstance(prompt, str | list | None):
        sides = [checked_messages(record[side], side) for side in SIDES]
        before = _prompt(prompt, *sides)
        return [as_conversation(record, before + _rest(before, *said)) for said in zip(sides, SIDES, strict=True)]
    kinds = ", ".join(f"{name} is a {type(record[name]).__name__}" for name in ("prompt", *SIDES) if name in record)
    raise Refused(kinds, "write all of them as strings, or all as lists of messages")


def _texts(prompt: str | None, chosen: str, rejected: str, weight: float | None) -> list[Completion]:
    sides = [text_of(chosen, "chosen"), text_of(rejected, "rejected")]
    if prompt is not None:
        check_text(prompt, "prompt")
        return [Completion(prompt, side, weight) for side in sides]
    cut = _common(chosen, rejected)
    return [Completion(side[:cut], side[cut:], weight) for side in sides]


def _common(chosen: str, rejected: str) -> int:
    """Where two texts part, brought back to the beginning of a word, so that no token straddles prompt and answer; a
    space before the word goes with it, as tokenizers have it, and each answer keeps something.

    >>> _common("Q: hi A: the cat", "Q: hi A: the car")           # "Q: hi A: the", " cat", " car"
    12
    """
    limit = min(len(chosen), len(rejected)) - 1
    cut = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    while cut and not chosen[cut - 1].isspace():
        cut -= 1
    return cut - 1 if cut and chosen[cut - 1] == " " else cut


def _prompt(prompt: str | list[Any] | None, chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """The messages before both answers, none of them trained."""
    if isinstance(prompt, list):
        before = checked_messages(prompt, "prompt")
    elif prompt is not None and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        before = checked_messages([{"role": "user", "content": prompt}], "prompt")
    else:
        before = _shared(chosen, rejected)
        asked = [message.get("content") for message in before if message["role"] == "user"]
        if prompt is not None and prompt not in asked:
            reason = f"prompt: {shown(prompt)} is not among the messages that chosen and rejected begin with"
            raise Refused(reason, "rename it away in the source, `columns: {prompt: unused}`, or correct the row")
    return [{**message, "train": False} for message in before]


def _shared(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """The messages that two conversations begin with; the last of each is its answer in any case."""
    limit = min(len(chosen), len(rejected)) - 1
    cut = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    if chosen == rejected:
        return chosen[:cut]  # refused as identical
    for messages, side in ((chosen, SIDES[0]), (rejected, SIDES[1])):
        role = messages[cut]["role"]
        if role != "assistant":
            raise Refused(f"chosen and rejected part at {side}[{cut}], which is a {role} turn", _ONE_PROMPT)
    return chosen[:cut]


def _rest(before: list[Message], messages: list[Message], side: str) -> list[Message]:
    """What the assistant says behind the prompt; the column may hold the prompt, too."""
    bare = [{key: value for key, value in message.items() if key != "train"} for message in messages]
    prompt = [{key: value for key, value in message.items() if key != "train"} for message in before]
    if bare[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]
    elif messages[0]["role"] in ("system", "developer", "user"):
        at = next((i for i, (a, b) in enumerate(zip(bare, prompt, strict=False)) if a != b), len(bare))
        reason = f"{side}: holds a whole conversation that does not begin with the prompt: they part at {side}[{at}]"
        raise Refused(reason, "correct the row; or rename the prompt away: `columns: {prompt: unused}`")
    if not messages:
        raise Refused(f"{side}: holds the prompt and no answer", DROP_ROW)
    if not has_assistant(messages) or messages[-1]["role"] != "assistant":
        raise Refused(f"{side}: ends with a {messages[-1]['role']} turn", _ONE_PROMPT)
    return messages
