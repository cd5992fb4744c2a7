"""What all kinds of rows are made of: the documents of a row's group, before any template and tokenizer.

Plain dictionaries and dataclasses, no pydantic: this runs for every row. A parser never changes the row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any

from burnish.data.messages import DROP_ROW, Message, Refused, check_text, checked_messages, parsed, shown

if TYPE_CHECKING:
    from burnish.types import RowKind


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


@dataclass(frozen=True, slots=True)
class Steps:
    """Places in a document that are graded.

    >>> Steps("2+2\\nis 5", (3, 8), (1.0, 0.0))       # "2+2" is right, "is 5" is wrong
    """

    text: str
    """All steps, as they stand in the document."""
    ends: tuple[int, ...]
    """For each step, the place in `text` behind its last character."""
    labels: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One document of a row's group."""

    content: Conversation | Completion | Text
    columns: dict[str, float] = field(default_factory=dict)
    """One number a document, beside `weight`; the same names in every part of every row of a kind."""
    name: str = ""
    """What a refusal calls it, `rejected`; empty where the row is one document."""
    trains: bool = True
    """A document without a trained token is refused. False: a head reads it, and no token need be trained."""
    steps: Steps | None = None
    """Present: the last token of each step is trained and graded in the column `label`, and no other token is."""


def as_conversation(record: dict[str, Any], messages: list[Message]) -> Conversation:
    """The messages with what else of the row goes into the template."""
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = parsed(tools, "tools") if tools.strip() else None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Refused(f"tools: {shown(tools)} is not a list of tools", "a tool is a JSON schema, or JSON text of one")
    kwargs = record.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise Refused(f"chat_template_kwargs: {shown(kwargs)} is not an object", "write {name: value}")
    return Conversation(messages, tools or None, dict(kwargs or {}), weight_of(record))


def context(messages: Any, place: str) -> list[Message]:
    """Checked messages, none of which is trained."""
    checked = checked_messages(messages, place)
    for message in checked:
        message["train"] = False
    return checked


def has_assistant(messages: list[Message]) -> bool:
    """Whether anything in them is written by the model."""
    return any(message["role"] == "assistant" for message in messages)


def answer(messages: Any, place: str) -> list[Message]:
    """Checked messages, of which the assistant's are trained."""
    checked = checked_messages(messages, place)
    if not has_assistant(checked):
        raise Refused(f"{place}: holds no assistant turn", f"the {place} is what the assistant is to say")
    return checked


def text_of(value: Any, place: str) -> str:
    """A string that says something."""
    if not isinstance(value, str):
        raise Refused(f"{place}: {shown(value)} is not a string", "write the document as one string")
    if not value:
        raise Refused(f"{place}: is empty", DROP_ROW)
    check_text(value, place)
    return value


def prompted(record: dict[str, Any], place: str) -> Conversation | Completion:
    """`prompt` and what `place` says, both strings or both messages; the prompt is context only."""
    prompt, said = record["prompt"], record[place]
    if isinstance(prompt, list) and isinstance(said, list):
        return as_conversation(record, context(prompt, "prompt") + answer(said, place))
    if not isinstance(prompt, str) or not isinstance(said, str):
        kinds = f"prompt is a {type(prompt).__name__}, {place} is a {type(said).__name__}"
        raise Refused(kinds, "write both as strings, or both as lists of messages")
    check_text(prompt, "prompt")
    return Completion(prompt, text_of(said, place), weight_of(record))


def weight_of(record: dict[str, Any]) -> float | None:
    """The row's `weight`."""
    weight = record.get("weight")
    if weight is None:
        return None
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not isfinite(weight) or weight < 0:
        cure = "write a number, or rename the column: `columns: {weight: unused}`"
        raise Refused(f"weight: {shown(weight)} is not a weight: a number of at least 0", cure)
    return float(weight)


def number(value: Any, place: str) -> float:
    """A finite number that is no truth value."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise Refused(f"{place}: {shown(value)} is not a number", f"write a number, or rename the column `{place}`")
    return float(value)


_MARKS: dict[RowKind, tuple[tuple[str, ...], str]] = {
    "preference": (("chosen", "rejected"), "pairs are trained with `workflow: {type: preference}` or `{type: reward}`"),
    "stepwise": (("completions", "labels"), "steps are graded with `workflow: {type: reward, loss: {type: process}}`"),
    "retrieval": (("positive",), "queries and what answers them are trained with `workflow: {type: embedding}`"),
    "unpaired": (
        ("prompt", "completion", "label"),
        "answers marked good or bad are trained with `workflow: {type: preference, loss: {type: kto}}`",
    ),
    "history": (("events",), "histories are rendered by `data.renderer: {type: events}`, with items for a tokenizer"),
    "conversation": (("messages",), "conversations are imitated with `workflow: {type: sft}`"),
}
"""Columns that tell a kind, and what trains on it."""


def wrong_kind(record: dict[str, Any], kind: RowKind, accepted: str) -> Refused:
    """The refusal of a row without the columns of `kind`; `accepted`: which they are."""
    has = ", ".join(record) or "no columns"
    for other, (marks, cure) in _MARKS.items():
        if other != kind and all(record.get(mark) is not None for mark in marks):
            reason = f"a row of the kind {other}, and the workflow's loss reads the kind {kind}"
            return Refused(f"{reason}: the row has {has}; accepted are {accepted}", cure)
    cure = "rename the columns in the source: `columns: {question: prompt, answer: completion}`"
    return Refused(f"unknown format: the row has {has}; accepted are {accepted}", cure)
