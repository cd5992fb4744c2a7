"""Procedural tasks of the package reasoning-gym: rows without a file, each with what its scorer needs."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from annotated_types import Ge, Interval

from burnish.data.sources.base import RowTable, Source
from burnish.errors import DataError
from burnish.types import Row

HASH_ORDERED = frozenset({"isomorphic_strings", "polynomial_multiplication", "ransom_note"})
"""Tasks of 0.1.25 that ask something else in each process, by the order of its sets."""
UNREPEATABLE = frozenset({"codeio"})
"""Tasks of 0.1.25 whose exercises differ whenever they are made."""


class ReasoningGym(Source):
    """`size` exercises of one task, such as `chain_sum`, `countdown` or `spell_backward`; row number i is the same
    wherever it is made. Rows have `prompt`, one message or two, `answer`, `task` and `entry`: what the reward
    `reasoning_gym` reads."""

    type: Literal["reasoning_gym"] = "reasoning_gym"
    task: str
    """By its name there."""
    size: Annotated[int, Ge(1)] = 1000
    """Exercises."""
    seed: Annotated[int, Interval(ge=0, lt=2**32)] = 42
    """Other exercises for another; runs of seeds less than `size` apart share some."""
    config: dict[str, Any] = {}
    """How hard they are: `{min_terms: 2, max_terms: 3}`; its names depend on the task."""
    system_prompt: str | None = None
    """What stands before each question, as a system message."""

    def open(self) -> RowTable:
        try:
            with warnings.catch_warnings():  # of a package that it needs, when it is compiled
                warnings.simplefilter("ignore", SyntaxWarning)
                from reasoning_gym.factory import DATASETS, create_dataset
        except ImportError as error:
            cure = "pip install 'burnish[tasks]'"
            raise DataError("the package `reasoning-gym` is not installed", self._where, cure) from error
        if self.task not in DATASETS:
            near = difflib.get_close_matches(self.task, DATASETS, n=3)
            cure = f"did you mean {' or '.join(near)}?" if near else f"one of: {', '.join(sorted(DATASETS))}"
            raise DataError(f"reasoning-gym has no task '{self.task}'", "reasoning_gym", cure)
        self._check([field.name for field in dataclasses.fields(DATASETS[self.task][1])])
        config = self.config | {"size": self.size, "seed": self.seed}
        try:
            dataset = create_dataset(self.task, **config)
        except (AssertionError, TypeError, ValueError, AttributeError, KeyError) as error:  # as tasks refuse a config
            cure = "correct `config`; its names and ranges are in the package's description of the task"
            raise DataError(f"the task refuses its config: {error}", self._where, cure) from error
        return ReasoningGymTable(dataset, self, config)

    @property
    def _where(self) -> str:
        return f"reasoning_gym:{self.task}"

    def _check(self, known: list[str]) -> None:
        for name in self.config:
            if name in ("size", "seed"):
                raise DataError(f"`config` has `{name}`", self._where, f"write `{name}` beside `config`")
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                known = [each for each in known if each not in ("size", "seed")]
                cure = f"did you mean '{near[0]}'?" if near else f"it has: {', '.join(known) or 'nothing to set'}"
                raise DataError(f"the task has no setting `{name}`", self._where, cure)
        if self.task in UNREPEATABLE:
            reason = "this task asks something else whenever it is asked, so that no run could be resumed"
            raise DataError(reason, self._where, "choose another task")
        if self.task in HASH_ORDERED and not os.environ.get("PYTHONHASHSEED", "random").isdigit():
            raise DataError(
                "this task asks something else in each process, so that no run could be resumed",
                self._where,
                "start with the environment variable PYTHONHASHSEED=0, or choose another task",
            )


class ReasoningGymTable:
    """Exercises by number, made when they are asked for."""

    def __init__(self, dataset: Any, source: ReasoningGym, config: dict[str, Any]) -> None:
        self._dataset, self._source, self._config = dataset, source, config
        self._renamed: Callable[[dict[str, Any]], dict[str, Any]] = source.renamed

    def __len__(self) -> int:
        return len(self._dataset)

    def rows(self, indices: Sequence[int]) -> list[Row]:
        """The exercises of these numbers, in this order. Raises DataError: one cannot be made."""
        return [self._row(int(index)) for index in indices]

    def _row(self, index: int) -> Row:
        where = f"reasoning_gym:{self._source.task}:{index}"
        try:
            entry = self._dataset[index]
            written = json.dumps({"config": self._config, "entry": _without_tuples(entry)})
        except Exception as error:  # of the task: each has its own
            cure = "leave out this task, or change its `config` or `seed`"
            raise DataError(f"the exercise cannot be made: {type(error).__name__}: {error}", where, cure) from error
        system = [{"role": "system", "content": self._source.system_prompt}] if self._source.system_prompt else []
        record = {
            "prompt": [*system, {"role": "user", "content": entry["question"]}],
            "answer": entry["answer"],
            "task": self._source.task,
            "entry": written,
        }
        return Row(self._renamed(record), where)


def _without_tuples(value: Any) -> Any:
    """Tuples as `{"tuple": [...]}`, which JSON would make lists of: scorers of grids compare with ==."""
    if isinstance(value, tuple):
        return {"tuple": [_without_tuples(each) for each in value]}
    if isinstance(value, list):
        return [_without_tuples(each) for each in value]
    if isinstance(value, dict):
        return {name: _without_tuples(each) for name, each in value.items()}
    return value
