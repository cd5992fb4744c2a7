"""Where every token went: counts of what training consumed, by fate and by source."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Seen(NamedTuple):
    """A row of a source that the run has passed: packed, or dropped on the way."""

    source: int
    fates: Counter[str]
    dropped: bool


class Ledger:
    """Totals over the consumed part of a stream. They ride in its state, so they are exact across a resume."""

    def __init__(self, sources: Sequence[str], row_length: int) -> None:
        """`sources`: what people call them, `data.train.0`."""
        self._names = tuple(sources)
        self._row_length = row_length
        self._blocks = 0
        self._packed = 0
        self._samples = [0] * len(sources)
        self._dropped = [0] * len(sources)
        self._tokens: list[Counter[str]] = [Counter() for _ in sources]

    def count(self, seen: Sequence[Seen]) -> None:
        """Rows of the sources that came with a block, or were dropped before it."""
        for source, fates, dropped in seen:
            self._samples[source] += 1
            self._dropped[source] += dropped
            self._tokens[source].update(fates)

    def count_block(self, tokens: int) -> None:
        """A packed row with this many tokens that are not padding; 0 for an empty one."""
        self._blocks += 1
        self._packed += tokens

    def report(self) -> dict[str, Any]:
        """JSON for people.

        `samples` rows of the sources, of them `dropped`; `tokens` by fate; `blocks` packed rows of `slots` tokens in
        all, of which `padding` hold none; `fill` = 1 - padding / slots; and the same by source.
        """
        slots = self._blocks * self._row_length
        sources = {
            name: {"samples": samples, "dropped": dropped, "tokens": dict(tokens)}
            for name, samples, dropped, tokens in zip(
                self._names, self._samples, self._dropped, self._tokens, strict=True
            )
        }
        return {
            "samples": sum(self._samples),
            "dropped": sum(self._dropped),
            "tokens": dict(sum(self._tokens, Counter())),
            "blocks": self._blocks,
            "slots": slots,
            "padding": slots - self._packed,
            "fill": self._packed / slots if slots else 0.0,
            "sources": sources,
        }

    def state(self) -> dict[str, Any]:
        return {
            "blocks": self._blocks,
            "packed": self._packed,
            "samples": list(self._samples),
            "dropped": list(self._dropped),
            "tokens": [dict(tokens) for tokens in self._tokens],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self._blocks, self._packed = state["blocks"], state["packed"]
        self._samples, self._dropped = list(state["samples"]), list(state["dropped"])
        self._tokens = [Counter(tokens) for tokens in state["tokens"]]


def add_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The ledger of a run from those of its ranks."""
    return {
        "blocks": sum(state["blocks"] for state in states),
        "packed": sum(state["packed"] for state in states),
        "samples": [sum(counts) for counts in zip(*(state["samples"] for state in states), strict=True)],
        "dropped": [sum(counts) for counts in zip(*(state["dropped"] for state in states), strict=True)],
        "tokens": [
            dict(sum(map(Counter, fates), Counter())) for fates in zip(*(s["tokens"] for s in states), strict=True)
        ],
    }
