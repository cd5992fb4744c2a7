"""Small worlds of users and items: tables, vocabularies and rendered histories."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from burnish.data.renderers.events import Events
from burnish.data.tokenizers.vocabulary import Vocabulary
from burnish.types import Rendered, Row


def write(path: Path, text: str) -> str:
    """Writes a small file; its path as a recipe holds it."""
    path.write_text(text)
    return str(path)


def vocabulary(folder: Path, items: str = "a b c d e f", **fields: Any) -> Any:
    """The tokenizer of a few items, in this order."""
    return Vocabulary(items=write(folder / "items.txt", "\n".join(items.split())), **fields).open(None)


def history(items: str, given: int = 0, **features: list[Any]) -> Row:
    """A row as the source `events` makes it; `features` hold one value an event."""
    events = [
        {"item": item} | {name: values[i] for name, values in features.items()} for i, item in enumerate(items.split())
    ]
    return Row({"user": "7", "events": events, "given": given}, "table.csv:2, user 7")


def rendered(tokenizer: Any, row: Row, **fields: Any) -> Rendered:
    """What the renderer makes of one row."""
    return Events(**fields).open(tokenizer).render([row])[0]


def chains(users: int, length: int, items: int, seed: int = 0) -> str:
    """A CSV table of users who mostly go from item i to i + 7: the order can be learned, and no item is popular."""
    rng = random.Random(seed)
    lines = ["user_id,item_id,timestamp"]
    for user in range(users):
        item = rng.randrange(items)
        for time in range(length):
            lines.append(f"u{user},i{item},{time}")
            item = (item + 7) % items if rng.random() < 0.9 else rng.randrange(items)
    return "\n".join(lines) + "\n"
