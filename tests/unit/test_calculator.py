"""A tool that a policy may call: whole episodes, and arithmetic that runs nothing else."""

from __future__ import annotations

import time

import pytest

from burnish.environments.calculator import Calculator, evaluate


def test_an_episode_of_a_call_and_an_answer():
    environment = Calculator()
    state = environment.reset({"answer": "391", "question": "?"}, seed=0)
    first = environment.step(state, "17 boxes of 23 pens: <calc>17*23</calc>")
    assert (first.messages, first.done, first.rewards) == ([{"role": "tool", "content": "391"}], False, {})
    last = environment.step(first.state, "There are 391 pens.")
    assert (last.messages, last.done, last.rewards) == ([], True, {"correct": 1.0})


@pytest.mark.parametrize(
    ("answer", "said", "correct"),
    [
        (391, "17 times 23 is 390", 0.0),
        ("the answer is 1,250.5", "so 1,250.50.", 1.0),
        (-3, "it is -3", 1.0),
        (3, "", 0.0),
        (3, "three", 0.0),
        (2, "<calc>1+2", 0.0),  # a call that was cut off is none, and its last number no answer
    ],
)
def test_the_last_number_of_a_turn_without_a_call_is_the_answer(answer, said, correct):
    environment = Calculator()
    ended = environment.step(environment.reset({"answer": answer}, seed=0), said)
    assert ended.done and ended.rewards == {"correct": correct}


def test_the_last_call_of_a_turn_counts_and_others_may_answer_it():
    environment = Calculator(role="user", tags=("[", "]"))
    state = environment.reset({"answer": 1}, seed=0)
    assert environment.step(state, "[1+1] no, [2*(3+4)]").messages == [{"role": "user", "content": "14"}]


def test_a_row_without_a_number_is_refused():
    with pytest.raises(ValueError, match="the column `answer` holds no number: 'many'"):
        Calculator().reset({"answer": "many"}, seed=0)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("(17 + 3) * 2", "40"),
        ("-7 // 2", "-4"),
        ("2 ** 10 % 1000", "24"),
        ("1 / 3", "0.3333333333"),
        ("0.1 + 0.2", "0.3"),
        ("1/0", "error: division by zero"),
        ("9**9**9", "error: the exponent is too large"),
        ("10**30", "error: the number is too large"),
        ("1e400", "error: the number is too large"),
        ("(-8)**0.5", "error: the number is too large"),
        ("True + 1", "error: not arithmetic"),
        ("__import__('os')", "error: not arithmetic"),
        ("1 +", "error: not arithmetic"),
        ("", "error: not arithmetic"),
        ("\0", "error: not arithmetic"),
        ("1+" * 200 + "1", "error: longer than 200 characters"),
        ("(" * 99 + "1" + ")" * 99, "1"),
    ],
)
def test_arithmetic_and_nothing_else(expression, value):
    started = time.monotonic()
    assert evaluate(expression) == value
    assert time.monotonic() - started < 1
