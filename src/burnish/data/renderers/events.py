"""Member histories as tokens: each event its item, between what is known before it and what it told.

Knows the layout of a vocabulary of items, not its files; knows nothing of packing.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from annotated_types import Ge

from burnish.data.renderers.base import Renderer
from burnish.data.sources.interactions import spelled
from burnish.data.tokenizers.vocabulary import items_of
from burnish.errors import DataError
from burnish.types import CONVERSATIONS, Group, Rendered, Row, RowFormat, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from burnish.data.dialogue_items import ItemDialogue
    from burnish.data.tokenizers.vocabulary import Items


class Events(Renderer):
    """Rows of the source `events`: item by item, each predicted from those before it.

    A history of 242 (rated 3) and 302 (rated 4) with `feedback: [rating]`: `242 rating=3 302`; only items are trained.
    """

    type: Literal["events"] = "events"
    context: list[str] = []
    """Features of an event that stand before its item, and so help to predict it: `[device, hour]`."""
    feedback: list[str] = []
    """Features of an event that stand after its item, and so help with the next: `[rating]`."""
    max_events: Annotated[int, Ge(1)] | None = None
    """Of a longer history the most recent events are kept; those cut are counted as truncated. Absent: all are kept."""
    unknown: Literal["refuse", "drop"] = "refuse"
    """What happens to an event whose item, and to a feature whose value, is not in the vocabulary."""
    short: Literal["refuse", "drop"] = "refuse"
    """What happens to a history with nothing to predict, because it is empty or has one event."""

    def open(self, tokenizer: PreTrainedTokenizerBase, row_format: RowFormat = CONVERSATIONS) -> LiveEvents:
        """Finds items and features in the vocabulary.

        Raises:
            DataError: the tokenizer has no items or lacks a feature, or the losses want other rows than histories.
        """
        if row_format.kind not in ("conversation", "history", "rollout"):
            cure = "use a loss that reads histories: nll, sampled_softmax, ranking"
            raise DataError(f"a loss reads rows of {row_format.kind} data, not histories", "data.renderer", cure)
        items = items_of(tokenizer)
        if items is None:
            cure = "`data.tokenizer: {type: vocabulary, learn_from: [...]}`, or one that was exported with such a run"
            raise DataError("the tokenizer is not a vocabulary of items", "data.tokenizer", cure)
        vocab: dict[str, int] = tokenizer.get_vocab()
        names = {token.partition("=")[0] for token, number in vocab.items() if number < items.start and "=" in token}
        for name in [*self.context, *self.feedback]:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                cure = f"did you mean `{near[0]}`?" if near else f"`data.tokenizer.features: {{{name}: [...]}}`"
                raise DataError(f"the vocabulary has no feature `{name}`", "data.renderer", cure)
        bos = [] if tokenizer.bos_token is None else [vocab[str(tokenizer.bos_token)]]
        return LiveEvents(self, vocab, items, bos)


class Event(NamedTuple):
    """The ids of one event, and the name of its item."""

    name: str
    context: list[int]
    item: list[int]
    feedback: list[int]

    def __len__(self) -> int:
        return len(self.context) + len(self.item) + len(self.feedback)


class LiveEvents:
    """The renderer of one vocabulary."""

    chat_template: str | None = None

    def __init__(self, config: Events, vocab: dict[str, int], items: Items, bos: list[int]) -> None:
        self.config, self.vocab, self.bos = config, vocab, bos
        codes = {item: [vocab[token] for token in tokens] for item, tokens in items.codes.items()}
        singles = {token: [number] for token, number in vocab.items() if items.start <= number < items.end}
        self.items = codes or singles
        """Item -> its ids."""
        self.features = {number for token, number in vocab.items() if number < items.start and "=" in token}
        """Ids of features of an event."""
        self._range = {"item_start": np.array(items.start), "item_end": np.array(items.end)}

    def render(self, rows: Sequence[Row]) -> list[Rendered]:
        """One result a row, in order. A history that cannot be used carries its refusal."""
        return [self._rendered(row) for row in rows]

    def dialogue(self, multi_turn: bool = False) -> ItemDialogue:
        """Histories as prompts: what is given of them is asked, items are sampled, and what came later is `future`."""
        from burnish.data.dialogue_items import ItemDialogue

        return ItemDialogue(self)

    def read(self, row: Row) -> tuple[list[Event], int] | DataError:
        """(the row's events that the vocabulary has, how many of them are given), or why it cannot be used."""
        if not isinstance(row.record.get("events"), list):
            reason = f"the row has no events; it has {', '.join(row.record) or 'nothing'}"
            return DataError(reason, row.where, "read it with `{type: events, path: ...}`")
        given, kept = row.record.get("given", 0), []
        for number, event in enumerate(row.record["events"]):
            found = self._event(event, number, row)
            if isinstance(found, DataError):
                return found
            if found is None:
                given -= number < row.record.get("given", 0)
            else:
                kept.append(found)
        return kept, given

    def _rendered(self, row: Row) -> Rendered:
        config, fates = self.config, Counter[str]()
        read = self.read(row)
        if isinstance(read, DataError):
            return Rendered(row, None, fates, read)
        kept, given = read
        if unknown := len(row.record["events"]) - len(kept):
            fates["dropped: unknown item"] = unknown
        cut = max(0, len(kept) - (config.max_events or len(kept)))
        if cut:
            fates["truncated"] += sum(map(len, kept[:cut]))
        return self._finished(row, kept[cut:], given - cut, fates, self.bos if not cut else [])

    def _event(self, event: dict[str, Any], number: int, row: Row) -> Event | DataError | None:
        item = self.items.get(event["item"])
        if item is None:
            return None if self.config.unknown == "drop" else self._unknown(f"item '{event['item']}'", number, row)
        sides = []
        for names in (self.config.context, self.config.feedback):
            ids: list[int] = []
            for name in names:
                value = event.get(name)
                for one in value if isinstance(value, list) else [value]:
                    token = f"{name}={spelled(one)}"
                    if token in self.vocab:
                        ids.append(self.vocab[token])
                    elif self.config.unknown == "refuse":
                        return self._unknown(f"feature '{token}'", number, row)
            sides.append(ids)
        return Event(event["item"], sides[0], item, sides[1])

    def _unknown(self, what: str, number: int, row: Row) -> DataError:
        place = row.record.get("places", {number: f"{row.where}, event {number}"})[number]
        cure = "add it to the vocabulary, or leave it out with `data.renderer.unknown: drop`"
        return DataError(f"{what} is not in the vocabulary", place, cure)

    def _finished(self, row: Row, events: list[Event], given: int, fates: Counter[str], bos: list[int]) -> Rendered:
        ids, trained = list(bos), [False] * len(bos)
        given = max(given, 0 if bos else 1)  # the first item is predicted from the beginning, where that has a token
        for number, event in enumerate(events):
            last = number == len(events) - 1
            feedback = [] if last else event.feedback  # nothing comes after it that it could help with
            ids += [*event.context, *event.item, *feedback]
            trained += [False] * len(event.context)
            trained += [number >= given] * len(event.item)
            trained += [False] * len(feedback)
        if not any(trained):
            what = "is empty" if not events else f"has nothing to predict: {len(events)} event, {given} of them given"
            refused = self.config.short == "refuse" and not fates["dropped: unknown item"]
            cure = "remove it, or leave such histories out with `data.renderer.short: drop`"
            fates["dropped: nothing to predict"] += len(ids)
            return Rendered(row, None, fates, DataError(f"the history {what}", row.where, cure) if refused else None)
        fates["trained"] += sum(trained)
        fates["masked"] += len(ids) - sum(trained)
        # The scalars are the same for all: losses on items read in them which ids are items.
        columns = {"weight": np.array(1.0, np.float32), **self._range}
        sample = Sample(np.array(ids, np.int32), np.array(trained), row.where, columns)
        return Rendered(row, Group((sample,)), fates)
