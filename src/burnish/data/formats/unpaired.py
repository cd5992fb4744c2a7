"""Single answers marked good or bad.

Accepted: `prompt`, `completion` (both strings, or both lists of messages) and `label`, or `kto_tag`: true or
"desirable", false or "undesirable". A row may add `tools`, `chat_template_kwargs`, `weight`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from burnish.data.formats.base import Part, prompted, wrong_kind
from burnish.data.messages import DROP_ROW, Refused, shown

if TYPE_CHECKING:
    from burnish.types import RowFormat

_SIGNS = {True: 1.0, "desirable": 1.0, False: -1.0, "undesirable": -1.0}
_LABELS = ("label", "kto_tag")


def parts(record: dict[str, Any], _: RowFormat) -> list[Part]:
    """The answer behind its prompt."""
    if record.get("prompt") is None or record.get("completion") is None:
        raise wrong_kind(record, "unpaired", "prompt, completion and label")
    name, label = next(((name, record[name]) for name in _LABELS if record.get(name) is not None), ("label", None))
    if label is None:
        raise Refused("label: is missing", DROP_ROW)
    if not isinstance(label, bool | str) or label not in _SIGNS:
        raise Refused(f"{name}: {shown(label)} is neither true nor false", 'write true or false, or "desirable"')
    return [Part(prompted(record, "completion"), {"preference": _SIGNS[label]})]
