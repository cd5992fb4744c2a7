"""1 where the mathematical answer of a completion equals the row's: 0.5 is \\frac{1}{2}."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from annotated_types import Ge, Interval

from burnish.errors import DataError
from burnish.rewards.base import LiveReward, Reward
from burnish.rewards.completions import final_text, values_of


class Math(Reward):
    """Takes the answer out of the policy's last words (`\\boxed{}`, LaTeX, or the last expression) and compares it with
    a column of the row symbolically, by the package math-verify."""

    type: Literal["math"] = "math"
    column: str = "answer"
    """LaTeX, with or without dollar signs, or a plain expression."""
    precision: Annotated[int, Interval(ge=1, le=15)] = 6
    """Decimal places to which numbers must agree."""
    expression_seconds: Annotated[int, Ge(1)] = 2
    """Longest for reading one expression and for one comparison; beyond, the answer counts as wrong."""

    @property
    def needed_columns(self) -> tuple[str, ...]:
        return (self.column,)

    def open(self) -> LiveReward:
        try:
            from math_verify import parse
        except ImportError as error:
            cure = "pip install 'burnish[rewards]'"
            raise DataError("the package `math-verify` is not installed", "math", cure) from error
        parse("1")  # builds its expressions: 0.1 s that the first group does not wait for
        return self._scores

    def _scores(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[float]:
        from math_verify import parse, verify

        # Its limits are alarms, which end what Python computes; the process's deadline ends the rest.
        limit = self.expression_seconds
        scores = []
        for completion, answer in zip(completions, values_of(columns, self.column), strict=True):
            gold = parse(str(answer), parsing_timeout=limit)
            if not gold:
                reason = f"column '{self.column}': {answer!r} cannot be read as mathematics"
                raise DataError(reason, cure="correct the row, or compare texts: `type: exact_match`")
            said = parse(final_text(completion), parsing_timeout=limit)
            scores.append(float(verify(gold, said, float_rounding=self.precision, timeout_seconds=limit)))
        return scores
