"""What a row asks: the turns before the answer, whatever kind of row it is.

Knows no template and no tokenizer.
"""

from __future__ import annotations

from burnish.data.formats.base import Conversation, as_conversation, text_of
from burnish.data.formats.conversations import said
from burnish.data.messages import Message, Refused, checked_messages
from burnish.errors import DataError
from burnish.types import Row


def asked(row: Row) -> Conversation:
    """The conversation up to where the assistant is to speak; earlier assistant turns are context (`train: False`).

    Its `prompt`, a string or messages, where it has one, so rows of preferences and of rewards ask as well; else its
    conversation without the assistant's last turn.

    Raises:
        DataError: at `row.where`: no one asks anything.
    """
    try:
        question = _asked(row)
        if not question.messages or question.messages[-1]["role"] not in ("user", "tool"):
            last = question.messages[-1]["role"] if question.messages else "nobody"
            raise Refused(f"nothing is left to answer: the last to speak is {last}", "end with a user's or tool's turn")
    except Refused as refused:
        raise DataError(refused.reason, row.where, refused.cure) from None
    for message in question.messages:
        if message["role"] == "assistant":
            message["train"] = False
    return question


def _asked(row: Row) -> Conversation:
    prompt = row.record.get("prompt")
    if prompt is not None:
        turns: list[Message] = [{"role": "user", "content": prompt}]
        if isinstance(prompt, str):
            text_of(prompt, "prompt")
        return as_conversation(row.record, turns if isinstance(prompt, str) else checked_messages(prompt, "prompt"))
    content = said(row.record)
    if not isinstance(content, Conversation):
        raise Refused("a plain text asks nothing", "rename the column in the source: `columns: {text: prompt}`")
    if content.messages[-1]["role"] == "assistant":
        content.messages.pop()
    return content
