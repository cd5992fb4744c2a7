"""A vocabulary of items, with no text in it: one token an item, or one for each of its semantic codes.

Ids are laid out as specials, context features, items; where the items are, and which codes each has, is kept in the
tokenizer's own configuration, so that an exported folder knows it too. Must not know histories.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self

from annotated_types import Ge
from pydantic import model_validator

from burnish.data.tokenizers.base import Tokenizer
from burnish.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD, BOS = "<pad>", "<bos>"


class Vocabulary(Tokenizer):
    """Items as tokens, by exactly one of `items`, `learn_from` and `codes`. For a fresh model, `model.config`."""

    type: Literal["vocabulary"] = "vocabulary"
    items: str | None = None
    """A file of one item id a line; ids of tokens follow its order."""
    learn_from: list[str] | None = None
    """Tables of interactions (see the source `events`): every item in them, the most frequent first."""
    codes: str | None = None
    """Semantic ids: a JSON lines file of `{"item": "242", "codes": [12, 3, 7]}`. The codes of a level are tokens of
    their own, `c1=12`, `c2=3`, `c3=7`, and every item has as many."""
    columns: dict[str, str] = {}
    """With `learn_from`, the tables' names for what Burnish calls otherwise: `{movieId: item}`."""
    min_count: Annotated[int, Ge(1)] = 1
    """With `learn_from`: items that occur less often get no token."""
    features: dict[str, list[str]] = {}
    """Context of an event, a token each: `{rating: ["1", "2", "3", "4", "5"]}` gives `rating=1` and so on."""
    bos: bool = False
    """Begin every history with a token, from which its first item is predicted."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        given = [name for name in ("items", "learn_from", "codes") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"items come from one of `items`, `learn_from` and `codes`, not {len(given)} of them")
        return self

    def open(self, model_path: str | None, revision: str = "main") -> PreTrainedTokenizerBase:
        """The tokenizer of these items; `tokenizer("242 302")` are the ids of two of them.

        Raises:
            DataError: at file and line: an id that is empty, listed twice or holds white space; codes that are not a
                list of as many numbers as the others, or another item's.
        """
        features = [f"{name}={value}" for name, values in self.features.items() for value in values]
        codes: dict[str, list[str]] = {}
        if self.codes is not None:
            codes = _read_codes(self.codes)
            items = sorted({token for tokens in codes.values() for token in tokens}, key=_by_level)
        else:
            items = list(self._learned() if self.items is None else _read_items(self.items))
        return _tokenizer([PAD, *([BOS] if self.bos else []), *features], items, codes)

    def _learned(self) -> list[str]:
        from burnish.data.sources._files import find_files
        from burnish.data.sources.interactions import identifier, place, read_events

        counts: Counter[str] = Counter()
        first: dict[str, str] = {}
        for path in self.learn_from or []:
            for file in find_files(path, ""):
                for record, line in read_events(file, self._renamed):
                    item = identifier(record, "item", place(file, line))
                    if item not in counts:
                        first[item] = place(file, line)
                    counts[item] += 1
        for item, where in first.items():
            _check(item, where)
        kept = [item for item, count in counts.items() if count >= self.min_count]
        if not kept:
            raise DataError("no item occurs often enough", "data.tokenizer.min_count", "lower it")
        return sorted(kept, key=lambda item: (-counts[item], len(item), item))

    def _renamed(self, record: dict[str, Any]) -> dict[str, Any]:
        return {self.columns.get(name, name): value for name, value in record.items()}


class Items(NamedTuple):
    """What a tokenizer made here knows of its items."""

    start: int
    end: int
    """Ids of their tokens: start..end."""
    codes: dict[str, list[str]]
    """Item -> its tokens; empty where the item is its token."""


def items_of(tokenizer: PreTrainedTokenizerBase) -> Items | None:
    """The items of a tokenizer, also of one read back from an export; None: it is not a vocabulary of items."""
    found = tokenizer.init_kwargs.get("items")
    return None if found is None else Items(found["start"], found["end"], found["codes"])


def _tokenizer(others: list[str], items: list[str], codes: dict[str, list[str]]) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    twice = [token for token, count in Counter([*others, *items]).items() if count > 1]
    if twice:
        raise DataError(f"'{twice[0]}' would be two tokens", "data.tokenizer", "rename the item or the feature")
    vocab = {token: number for number, token in enumerate([*others, *items])}
    backend = Backend(models.WordLevel(vocab))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS if BOS in others else None,
        items={"start": len(others), "end": len(vocab), "codes": codes},
    )


def _read_items(path: str) -> list[str]:
    places: dict[str, str] = {}
    for line, where in _lines(path):
        if line in places:
            raise DataError(f"'{line}' is listed already, at {places[line]}", where, "remove one")
        places[_check(line, where)] = where
    return _some(list(places), path)


def _read_codes(path: str) -> dict[str, list[str]]:
    from burnish.data.sources.interactions import identifier
    from burnish.data.sources.jsonl import parse_line

    found: dict[str, list[str]] = {}
    owners: dict[tuple[str, ...], str] = {}
    for line, where in _lines(path):
        record = parse_line(line.encode() + b"\n", where)
        item, codes = _check(identifier(record, "item", where), where), record.get("codes")
        if not isinstance(codes, list) or not codes or any(type(code) is not int for code in codes):
            raise DataError(f"codes: {codes!r} is not a list of whole numbers", where, '{"item": "a", "codes": [1, 2]}')
        tokens = [f"c{level}={code}" for level, code in enumerate(codes, 1)]
        if found and len(tokens) != len(next(iter(found.values()))):
            raise DataError(
                f"{len(codes)} codes, the items before have {len(next(iter(found.values())))}",
                where,
                "give each as many",
            )
        if item in found:
            raise DataError(f"'{item}' is listed already", where, "remove one")
        if (owner := owners.setdefault(tuple(tokens), item)) != item:
            cure = "give every item a last code that tells it from the others"
            raise DataError(f"'{item}' has the codes of '{owner}', so neither can be recommended", where, cure)
        found[item] = tokens
    _some(list(found), path)
    return found


def _by_level(token: str) -> tuple[int, int]:
    level, _, code = token[1:].partition("=")
    return int(level), int(code)


def _lines(path: str) -> Iterator[tuple[str, str]]:
    """(line, place) of a text file, without line ends; blank ones at its end are passed over."""
    from burnish.data.sources._files import find_files

    for file in find_files(path, ""):
        with file.open() as handle:
            try:
                lines = handle.read().decode("utf-8-sig").rstrip().splitlines()
            except UnicodeDecodeError as error:
                raise DataError(f"is not UTF-8: {error}", file.path, "convert it to UTF-8") from error
        yield from ((line, f"{file.path}:{number}") for number, line in enumerate(lines, 1))


def _check(item: str, where: str) -> str:
    if not item or item.split() != [item]:
        cure = (
            "remove the line"
            if not item.strip()
            else "replace the white space, as in `Toy_Story`, here and in the histories"
        )
        raise DataError(f"item '{item}' is empty or holds white space, which parts tokens", where, cure)
    return item


def _some(items: list[str], path: str) -> list[str]:
    if not items:
        raise DataError("holds no item", path, "one item id a line")
    return items
