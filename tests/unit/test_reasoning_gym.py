"""Tasks of reasoning-gym as rows, and what their own scorers say of answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from burnish.data.sources.base import RowShards, RowTable
from burnish.data.sources.reasoning_gym import HASH_ORDERED, UNREPEATABLE, ReasoningGym
from burnish.errors import DataError
from burnish.rewards.reasoning_gym import ReasoningGym as Scorer
from burnish.types import Row


def table(task: str, **fields: Any) -> RowTable:
    opened = ReasoningGym(task=task, **fields).open()
    assert not isinstance(opened, RowShards)
    return opened


def scores(row: Row, said: list[Any], **fields: Any) -> list[float]:
    columns = {name: [row.record[name]] * len(said) for name in ("answer", "task", "entry")}
    return Scorer(**fields).open()([row.record["prompt"]] * len(said), said, **columns)


def test_a_row_is_a_question_with_its_answer() -> None:
    config = {"min_terms": 2, "max_terms": 3, "max_digits": 2}
    rows = table("chain_sum", size=50, config=config, system_prompt="Answer with a number.")
    assert len(rows) == 50
    third, first = rows.rows([3, 0])
    assert third.where == "reasoning_gym:chain_sum:3"
    system, user = third.record["prompt"]
    assert system == {"role": "system", "content": "Answer with a number."}
    asked, _, equals = user["content"].partition(": ")[2].rpartition(" ")
    assert equals == "="
    assert third.record["answer"] == str(eval(asked))
    assert third.record["task"] == "chain_sum"
    assert json.loads(third.record["entry"])["config"] == {**config, "size": 50, "seed": 42}
    assert table("chain_sum", size=50, config=config).rows([0])[0].record["prompt"] == first.record["prompt"][1:]
    assert table("chain_sum", size=50, config=config, seed=43).rows([0])[0].record != first.record


def test_columns_are_renamed() -> None:
    row = table("chain_sum", size=2, columns={"answer": "completion"}).rows([0])[0]
    assert set(row.record) == {"prompt", "completion", "task", "entry"}


def test_the_tasks_own_scorer_is_asked() -> None:
    row = table("chain_sum", size=4).rows([1])[0]
    answer = row.record["answer"]
    chat = [{"role": "assistant", "content": f"<answer>{answer}</answer>"}]
    assert scores(row, [answer, f" {answer}\n", "x", ""]) == [1.0, 1.0, 0.0, 0.0]
    partly = len(answer) / len(f"it is {answer}")  # what most tasks give an answer that stands in more words
    assert scores(row, [f"it is {answer}"]) == [partly]
    assert scores(row, [chat, answer], extract="<answer>(.*?)</answer>") == [1.0, 0.0]


def test_a_scorer_knows_the_config_of_its_row() -> None:
    places = {"min_num_decimal_places": 1, "max_num_decimal_places": 1}
    row = table("decimal_arithmetic", size=2, config=places).rows([0])[0]
    right = float(row.record["answer"])
    near, far = str(right + 0.0625), str(right + 0.125)  # the task allows for one unit of its last place
    assert scores(row, [row.record["answer"], near, far]) == [1.0, 1.0, 0.0]


def test_tuples_of_an_entry_come_back() -> None:
    row = table("rearc", size=1).rows([0])[0]
    assert scores(row, [row.record["answer"], "1 2\n3 4"])[0] == 1.0


@pytest.mark.parametrize(
    ("task", "config", "reason"),
    [
        ("chain_summ", {}, "no task 'chain_summ'\n.*did you mean chain_sum"),
        ("chain_sum", {"min_term": 2}, "no setting `min_term`\n.*did you mean 'min_terms'"),
        ("chain_sum", {"zork": 2}, "it has: min_terms, max_terms, min_digits, max_digits, allow_negation$"),
        ("chain_sum", {"seed": 2}, "write `seed` beside `config`"),
        ("chain_sum", {"min_terms": 9}, "refuses its config: max_terms must be >= min_terms"),
        ("chain_sum", {"min_terms": "two"}, "refuses its config: '>' not supported"),
        ("composite", {}, "refuses its config: Must specify at least one dataset"),
        ("codeio", {}, "asks something else whenever it is asked"),
        ("ransom_note", {}, "asks something else in each process.*\n.*PYTHONHASHSEED=0"),
    ],
)
def test_what_a_task_does_not_know_is_refused(
    task: str, config: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(DataError, match=f"(?s){reason}"):
        table(task, config=config)


ALL_TASKS = """
import hashlib
from reasoning_gym.factory import DATASETS
from burnish.data.sources.reasoning_gym import UNREPEATABLE, ReasoningGym
from burnish.rewards.reasoning_gym import ReasoningGym as Scorer
score = Scorer().open()
for task in sorted(DATASETS.keys() - {"composite"} - UNREPEATABLE):
    rows = [row.record for row in ReasoningGym(task=task, size=6).open().rows([5, 4, 0])]
    said = hashlib.md5(repr([row["prompt"] for row in rows]).encode()).hexdigest()
    right = [row for row in rows if row["answer"] is not None]
    values = [score([""], [row["answer"]], task=[task], entry=[row["entry"]])[0] for row in right]
    print("@", task, said, min(values, default=1.0))
"""


@pytest.mark.long
def test_all_tasks_are_scored_and_ask_the_same_in_every_process() -> None:
    asked = []
    for seed in "12":
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", ALL_TASKS],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=55,
        )
        assert done.returncode == 0, done.stderr
        lines = [line.partition("@ ")[2].split() for line in done.stdout.splitlines() if "@ " in line]
        asked.append({task: said for task, said, _ in lines})
        assert [line for line in lines if line[2] != "1.0"] == []
    assert len(asked[0]) > 90
    assert {task for task in asked[0] if asked[0][task] != asked[1][task]} == HASH_ORDERED


@pytest.mark.long
def test_tasks_that_are_refused_do_differ() -> None:
    from reasoning_gym import create_dataset

    for task in UNREPEATABLE:
        first, second = (create_dataset(task, seed=42, size=40) for _ in range(2))
        assert any(first[index]["question"] != second[index]["question"] for index in range(40))
