"""1 where a completion matches a regular expression, else 0: formats, and answers that a pattern knows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from burnish.rewards.base import LiveReward, Reward
from burnish.rewards.completions import final_text
from burnish.rewards.patterns import Pattern


class Regex(Reward):
    """Looks for a pattern in the policy's last words. One that takes forever on a completion is stopped like any
    reward that hangs."""

    type: Literal["regex"] = "regex"
    pattern: Pattern
    r"""Of Python's `re`, such as `(?s)<think>.*</think>\s*<answer>.*</answer>`."""
    match: Literal["search", "full", "share"] = "search"
    """`full`: the pattern must match all of the text, white space around it aside. `share`: the share of the text's
    characters that its matches cover, instead of 1 or 0."""

    def open(self) -> LiveReward:
        pattern = re.compile(self.pattern)
        if self.match == "share":
            return partial(_shares, pattern)
        matches = pattern.search if self.match == "search" else pattern.fullmatch

        def scores(prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[float]:
            return [float(matches(final_text(completion).strip()) is not None) for completion in completions]

        return scores


def _shares(
    pattern: re.Pattern[str], prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]
) -> list[float]:
    texts = [final_text(completion).strip() for completion in completions]
    return [sum(len(found.group()) for found in pattern.finditer(text)) / max(len(text), 1) for text in texts]
