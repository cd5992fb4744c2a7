"""A tool that the policy may call: arithmetic."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from annotated_types import Ge

from burnish.environments.base import Environment, Observation

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_MOST_CHARACTERS, _LARGEST = 200, 10**12


class Calculator(Environment):
    """The policy may ask for the value of an expression, and is rewarded for the right number at the end.

        policy    17 boxes of 23 pens: <calc>17*23</calc>
        tool      391
        policy    There are 391 pens.                             over; rewards {"correct": 1.0}

    A turn without a call is the answer: its last number is compared with the row's. Let the sampling stop at the end of
    a call: `sampling: {stop: ["</calc>"]}`.
    """

    type: Literal["calculator"] = "calculator"
    max_turns: Annotated[int, Ge(1)] = 4
    """Turns of the policy in an episode; the last may still call, and is then wrong."""
    answer: str = "answer"
    """The row's column with the right number."""
    role: Literal["tool", "user"] = "tool"
    """Who the result is from: `user` for chat templates that know no tools."""
    tags: tuple[str, str] = ("<calc>", "</calc>")
    """What stands around an expression."""

    def reset(self, row: dict[str, Any], seed: int) -> Any:
        """Raises ValueError: the row's answer is no number."""
        found = _numbers(str(row.get(self.answer, "")))
        if not found:
            raise ValueError(f"the column `{self.answer}` holds no number: {row.get(self.answer)!r}")
        return {"answer": found[-1], "calls": 0}

    def step(self, state: Any, action: str) -> Observation:
        opening, closing = self.tags
        _, called, rest = action.rpartition(opening)
        if called and closing in rest:
            value = evaluate(rest[: rest.index(closing)])
            return Observation([{"role": self.role, "content": value}], {**state, "calls": state["calls"] + 1})
        found = [] if called else _numbers(action)  # a call that is cut off answers nothing
        correct = bool(found) and abs(found[-1] - state["answer"]) < 1e-6
        return Observation([], state, done=True, rewards={"correct": float(correct)})


def evaluate(expression: str) -> str:
    """The value of an arithmetic expression, or `error: ...`; nothing else is ever run.

    >>> evaluate("(17 + 3) * 2"), evaluate("1/0"), evaluate("open('x')")
    ('40', 'error: division by zero', 'error: not arithmetic')
    """
    if len(expression) > _MOST_CHARACTERS:
        return f"error: longer than {_MOST_CHARACTERS} characters"
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (ArithmeticError, ValueError, SyntaxError, RecursionError) as error:
        return f"error: {error if isinstance(error, ArithmeticError) else 'not arithmetic'}"
    return str(int(value)) if value == int(value) else f"{value:.10g}"


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value: Any = node.value
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = -_value(node.operand)
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) > 40:
            raise OverflowError("the exponent is too large")
        value = _BINARY[type(node.op)](left, right)
    else:
        raise ValueError("not arithmetic")
    if isinstance(value, complex) or not abs(value) <= _LARGEST:
        raise OverflowError("the number is too large")
    return value


def _numbers(text: str) -> list[float]:
    return [float(found.replace(",", "")) for found in _NUMBER.findall(text)]
