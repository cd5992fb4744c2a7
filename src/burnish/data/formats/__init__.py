"""What a row says, kind by kind: from a source's record to the documents of one group. A kind is one file.

Knows no template and no tokenizer, and never changes the row.
"""

from __future__ import annotations

from burnish.data.formats import conversations, labelled, preference, retrieval, stepwise, unpaired
from burnish.data.formats.base import Completion, Conversation, Part, Steps, Text
from burnish.data.messages import Refused
from burnish.errors import DataError
from burnish.types import CONVERSATIONS, Row, RowFormat

__all__ = ["Completion", "Conversation", "Part", "Steps", "Text", "conversation", "parts"]

_PARSERS = {
    "conversation": conversations.parts,
    "preference": preference.parts,
    "unpaired": unpaired.parts,
    "stepwise": stepwise.parts,
    "labelled": labelled.parts,
    "retrieval": retrieval.parts,
}


def parts(row: Row, row_format: RowFormat) -> list[Part]:
    """The documents of the row's group, in order.

    Raises:
        DataError: at `row.where`, with the reason, what in the row it concerns and a cure.
    """
    try:
        return _PARSERS[row_format.kind](row.record, row_format)
    except Refused as refused:
        raise DataError(refused.reason, row.where, refused.cure) from None


def conversation(row: Row) -> Conversation | Completion | Text:
    """What a row to be imitated says. Raises DataError."""
    (part,) = parts(row, CONVERSATIONS)
    return part.content
