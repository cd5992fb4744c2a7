"""What a task of reasoning-gym says of an answer: its own scorer, for rows of the source `reasoning_gym`."""

from __future__ import annotations

import functools
import json
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

from burnish.errors import DataError
from burnish.rewards.base import LiveReward, Reward
from burnish.rewards.completions import extracted, final_text, values_of
from burnish.rewards.patterns import Pattern


class ReasoningGym(Reward):
    """Between 0 and 1; many tasks give a little for an answer that is wrong but well formed."""

    type: Literal["reasoning_gym"] = "reasoning_gym"
    extract: Pattern | None = None
    """Where the answer is in a completion: the first group of the last match, such as `(?s)<answer>(.*?)</answer>`.
    Without a match the reward is 0. Absent: all of it."""

    @property
    def needed_columns(self) -> tuple[str, ...]:
        return ("task", "entry")

    def open(self) -> LiveReward:
        try:
            with warnings.catch_warnings():  # of a package that it needs, when it is compiled
                warnings.simplefilter("ignore", SyntaxWarning)
                from reasoning_gym import create_dataset
        except ImportError as error:
            cure = "pip install 'burnish[tasks]'"
            raise DataError("the package `reasoning-gym` is not installed", "reasoning_gym", cure) from error
        pattern = None if self.extract is None else re.compile(self.extract)

        @functools.lru_cache(64)
        def scorer(task: str, config: str) -> Callable[[str, Any], float]:
            return create_dataset(task, **json.loads(config)).score_answer

        def score(completion: Any, task: str, entry: str) -> float:
            answer = extracted(final_text(completion), pattern)
            if answer is None:
                return 0.0
            written = json.loads(entry, object_hook=_with_tuples)
            return float(scorer(task, json.dumps(written["config"]))(answer, written["entry"]))

        def scores(prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[float]:
            rows = zip(completions, values_of(columns, "task"), values_of(columns, "entry"), strict=True)
            return [score(*row) for row in rows]

        return scores


def _with_tuples(value: dict[str, Any]) -> Any:
    """The source writes tuples as `{"tuple": [...]}`: scorers of grids compare with ==, and [1] is not (1,)."""
    return tuple(value["tuple"]) if value.keys() == {"tuple"} else value
