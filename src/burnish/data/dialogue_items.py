"""Histories as prompts, and sampled tokens as items: what a policy without text recommends.

What is given of a row is the prompt; what came later is its column `future`, which rewards compare with. A turn is as
many tokens as the recipe's `max_new_tokens`, and nothing ends it before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from burnish.data.dialogue import json_columns
from burnish.errors import DataError
from burnish.rollouts import Dropped, Prompt

if TYPE_CHECKING:
    from burnish.data.renderers.events import LiveEvents
    from burnish.types import Row

_READ = ("events", "given", "places")
_SPLIT = "let the source say what is: `part: test`, or `future: 5`"


class ItemDialogue:
    """Items in, items out; see `rollouts.Dialogue`.

    User 7 saw a b c, then d e: with `future: 2` in the source the prompt is `a b c`, and a policy that samples the
    tokens of e and f has said `["e", "f"]`, of which one is in `future`.
    """

    stop_token_ids: tuple[int, ...] = ()

    def __init__(self, live: LiveEvents) -> None:
        self._live = live
        self._names = {tuple(ids): name for name, ids in live.items.items()}
        self._size = len(next(iter(self._names)))
        """Tokens of an item."""

    def prompts(self, rows: Sequence[Row], first_index: int) -> list[Prompt | Dropped | DataError]:
        """One a row: the most recent `max_events` of what is given."""
        return [self._prompt(row, index) for index, row in enumerate(rows, first_index)]

    def text(self, token_ids: Sequence[int]) -> str:
        """Names of items; what is none is left out."""
        return " ".join(name for name in self._slots(token_ids) if name)

    def said(self, prompt: Prompt, turns: Sequence[Any]) -> list[str]:
        """Names of the sampled items, turn after turn: a slot each, empty where the tokens are no item."""
        return [name for turn in turns[::2] for name in self._slots(turn)]

    def observe(self, prompt: Prompt, turns: Sequence[Any], messages: list[dict[str, Any]]) -> list[int]:
        """Contents are names of items and features, separated by spaces: `{"role": "user", "content": "7 rating=4"}`"""
        ids: list[int] = []
        for word in " ".join(str(message.get("content") or "") for message in messages).split():
            found = self._live.items.get(word) or ([self._live.vocab[word]] if word in self._live.vocab else None)
            if found is None:
                cure = "an environment for items answers with their names and `feature=value`"
                raise DataError(f"the environment said '{word}', which is not in the vocabulary", prompt.where, cure)
            ids += found
        return ids

    def _prompt(self, row: Row, index: int) -> Prompt | Dropped | DataError:
        read = self._live.read(row)
        if isinstance(read, DataError):
            return read
        config, (events, given) = self._live.config, read
        known, future = events[:given], events[given:]
        if not known or not future:
            what = "nothing is given" if not known else "nothing is left to predict"
            if config.short == "drop":
                return Dropped(index, row.where, f"of the history {what}")
            cure = f"{_SPLIT}; or leave such histories out with `data.renderer.short: drop`"
            return DataError(f"of a history of {len(events)} events {what}", row.where, cure)
        recent = known[-(config.max_events or len(known)) :]
        ids = [] if len(recent) < len(known) else list(self._live.bos)
        for event in recent:
            ids += [*event.context, *event.item, *event.feedback]
        try:
            columns = json_columns(row, _READ)
        except DataError as error:
            return error
        columns["future"] = [event.name for event in future]
        return Prompt(index, row.where, ids, [event.name for event in recent], columns)

    def _slots(self, token_ids: Sequence[int]) -> list[str]:
        """Names of items, an empty one where tokens are none. Features, which stand between items, take no slot."""
        ids = [token for token in token_ids if token not in self._live.features]
        return [self._names.get(tuple(ids[at : at + self._size]), "") for at in range(0, len(ids), self._size)]
