"""1 where a completion is the row's answer, else 0."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal

from burnish.errors import DataError
from burnish.rewards.base import LiveReward, Reward
from burnish.rewards.completions import extracted, final_text, values_of
from burnish.rewards.patterns import Pattern

_PUNCTUATION = str.maketrans("", "", string.punctuation)


class ExactMatch(Reward):
    """Compares the policy's last words, or what a pattern finds in them, with a column of the row."""

    type: Literal["exact_match"] = "exact_match"
    column: str = "answer"
    """A string, a number, or a list of them of which any will do."""
    extract: Pattern | None = None
    """Where the answer is in a completion: the first group of the last match, such as `<answer>(.*?)</answer>`. Without
    a match the reward is 0. Absent: all of it."""
    extract_answer: Pattern | None = None
    """The same for the column, such as `#### (.*)`."""
    ignore: list[Literal["case", "whitespace", "punctuation", "commas"]] = []
    """What does not count: `whitespace` takes any run of it for one space, `commas` makes 1,000 equal to 1000. White
    space around an answer never counts, nor how Unicode spells a letter."""

    @property
    def needed_columns(self) -> tuple[str, ...]:
        return (self.column,)

    def open(self) -> LiveReward:
        return self._scores

    def _scores(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[float]:
        answers = values_of(columns, self.column)
        return [self._score(final_text(each), answer) for each, answer in zip(completions, answers, strict=True)]

    def _score(self, text: str, answer: Any) -> float:
        said = extracted(text, None if self.extract is None else re.compile(self.extract))
        return float(said is not None and self._plain(said) in self._accepted(answer))

    def _accepted(self, answer: Any) -> list[str]:
        pattern = None if self.extract_answer is None else re.compile(self.extract_answer)
        accepted = []
        for each in answer if isinstance(answer, list) else [answer]:
            found = extracted(str(each), pattern) if isinstance(each, str | int | float) else None
            if found is None:
                reason = f"column '{self.column}': there is no answer in {each!r}"
                raise DataError(reason, cure="an answer is a string or a number; see `extract_answer`")
            accepted.append(self._plain(found))
        return accepted

    def _plain(self, text: str) -> str:
        text = unicodedata.normalize("NFC", text)
        if "case" in self.ignore:
            text = text.casefold()
        if "commas" in self.ignore:
            text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
        if "punctuation" in self.ignore:
            text = text.translate(_PUNCTUATION)
        if "whitespace" in self.ignore:
            text = " ".join(text.split())
        return text.strip()
