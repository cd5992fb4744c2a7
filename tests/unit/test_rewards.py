"""Built-in rewards, each against values worked out by hand."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from burnish.errors import DataError, UserError
from burnish.rewards.base import Reward, term_names
from burnish.rewards.completions import extracted, final_text
from burnish.rewards.exact_match import ExactMatch
from burnish.rewards.function import Function
from burnish.rewards.json_schema import JsonSchema
from burnish.rewards.math import Math
from burnish.rewards.overlong import Overlong
from burnish.rewards.regex import Regex
from burnish.rewards.worker import number_of


def said(reward: Reward, completions: list[Any], **columns: list[Any]) -> list[float]:
    return reward.open()(["?"] * len(completions), completions, **columns)


def chat(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def test_names_of_terms() -> None:
    unnamed = Regex(pattern="a")
    rewards = [unnamed, Overlong(max_tokens=2, buffer_tokens=1), unnamed, Regex(pattern="b", name="style")]
    assert term_names(rewards) == ["regex", "overlong", "regex_2", "style"]
    assert term_names([unnamed, Regex(pattern="b", name="regex"), unnamed]) == ["regex_2", "regex", "regex_3"]
    assert term_names([Function(path="a:b").model_copy(update={"type": "my_rewards:Judge"})]) == ["Judge"]


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("4", "4"),
        (chat("4"), "4"),
        ([{"role": "assistant", "content": "let me see"}, {"role": "tool", "content": "9"}, *chat("4")], "4"),
        ([{"role": "assistant", "content": "x"}, {"role": "tool", "content": "9"}], "x"),
        ([{"role": "tool", "content": "9"}], ""),
        ([{"role": "assistant", "content": None, "tool_calls": []}], ""),
        ([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}], "a"),
        (["tt1", "tt2"], "tt1 tt2"),
        ([], ""),
    ],
)
def test_the_last_words_of_a_completion(completion: Any, text: str) -> None:
    assert final_text(completion) == text


def test_the_last_match_is_the_answer() -> None:
    import re

    assert extracted(" 4 ", None) == "4"
    assert extracted("a=1, a= 2 ", re.compile(r"a=(.*?)(?:,|$)")) == "2"
    assert extracted("7 and 8", re.compile(r"\d")) == "8"
    assert extracted("none", re.compile(r"\d")) is None
    assert extracted("ab", re.compile(r"a(x)?b")) == ""


EXACT = [
    ({}, ["4", " 4\n", "4.", ""], "4", [1, 1, 0, 0]),
    ({}, ["4", "four", "5"], ["four", 4], [1, 1, 0]),
    (
        {"extract": "<answer>(.*?)</answer>"},
        ["<answer>4</answer>", "4", "<answer>4</answer><answer>5</answer>"],
        "4",
        [1, 0, 0],
    ),
    ({"extract_answer": "#### (.*)", "ignore": ["commas"]}, ["1,000", "1000", "10,00"], "so\n#### 1,000", [1, 1, 0]),
    ({"ignore": ["case"]}, ["PARIS", "par is"], "Paris", [1, 0]),
    ({"ignore": ["whitespace", "punctuation"]}, ["New  York!", "NewYork"], "New York", [1, 0]),
    ({}, ["e\u0301"], "\u00e9", [1]),
]


@pytest.mark.parametrize(("fields", "completions", "answer", "expected"), EXACT)
def test_exact_match(fields: dict[str, Any], completions: list[str], answer: Any, expected: list[float]) -> None:
    assert said(ExactMatch(**fields), completions, answer=[answer] * len(completions)) == expected


def test_exact_match_reads_messages_and_another_column() -> None:
    reward = ExactMatch(column="target")
    assert reward.needed_columns == ("target",)
    assert said(reward, [chat("a"), chat("b")], target=["a", "a"]) == [1, 0]


def test_exact_match_says_what_the_row_lacks() -> None:
    with pytest.raises(
        DataError, match="no column 'answer'; there are answers, finish_reason\n.*did you mean 'answers'"
    ):
        said(ExactMatch(), ["4"], answers=["4"], finish_reason=["stop"])
    with pytest.raises(DataError, match="column 'answer': there is no answer in 'four'"):
        said(ExactMatch(extract_answer=r"\d+"), ["4"], answer=["four"])
    with pytest.raises(DataError, match="there is no answer in None"):
        said(ExactMatch(), ["4"], answer=[None])


def test_a_pattern_that_is_none_is_refused_in_the_recipe() -> None:
    for make in (lambda: Regex(pattern="(a"), lambda: ExactMatch(extract="(a")):
        with pytest.raises(ValidationError, match=r"not a regular expression of Python: missing \), unterminated"):
            make()


def test_regex() -> None:
    texts = ["<think>\nx\n</think>\n<answer>4</answer>", "so <think>a</think><answer>4</answer>", "4"]
    pattern = r"(?s)<think>.*</think>\s*<answer>.*</answer>"
    assert said(Regex(pattern=pattern), [chat(text) for text in texts]) == [1, 1, 0]
    assert said(Regex(pattern=pattern, match="full"), [f" {text}\n" for text in texts]) == [1, 0, 0]
    assert said(Regex(pattern="[0-9]+", match="share"), ["12a4", " 1 2\n", "x", ""]) == [0.75, 2 / 3, 0, 0]


def test_overlong_is_the_papers() -> None:
    reward = Overlong(max_tokens=10, buffer_tokens=4)
    lengths = [0, 6, 7, 9, 10, 30]
    expected = [0.0, 0.0, -0.25, -0.75, -1.0, -1.0]
    assert said(reward, ["x"] * 6, completion_ids=[list(range(length)) for length in lengths]) == expected
    with pytest.raises(ValidationError, match="buffer_tokens 5 is longer than max_tokens 4"):
        Overlong(max_tokens=4, buffer_tokens=5)


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "size": {"$ref": "#/$defs/size"}},
    "required": ["city"],
    "$defs": {"size": {"type": "integer", "minimum": 1}},
}
DOCUMENTS = [
    ('{"city": "Oslo", "size": 7}', 1.0),
    ('Here:\n```json\n{"city": "Rome"}\n```\n', 1.0),
    ('```\n{"city": 1}\n```\nno:\n```json\n{"city": "Rome"}\n```', 1.0),
    ('{"city": "Oslo", "size": 0}', 0.25),
    ("[]", 0.25),
    ('{"city": "Oslo"', 0.0),
    ('{"city": "Oslo", "size": NaN}', 0.0),
    ("[" * 100_000, 0.0),
    ("", 0.0),
]


def test_json_schema(tmp_path: Path) -> None:
    texts, expected = zip(*DOCUMENTS, strict=True)
    assert tuple(said(JsonSchema(against=SCHEMA, parsed_value=0.25), list(texts))) == expected
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    assert said(JsonSchema(against=str(path)), list(texts)) == [float(value == 1.0) for value in expected]


def test_a_bad_schema_is_refused_and_nothing_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a JSON schema: at properties.city.type, 'text' is not valid"):
        JsonSchema(against={"properties": {"city": {"type": "text"}}}).open()
    with pytest.raises(DataError, match="cannot be read: .*No such file"):
        JsonSchema(against=str(tmp_path / "none.json")).open()
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DataError, match="holds a list, not a schema"):
        JsonSchema(against=str(tmp_path / "list.json")).open()
    started = time.monotonic()
    with pytest.raises(Exception, match="Unresolvable"):
        said(JsonSchema(against={"$ref": "http://192.0.2.1/schema.json"}), ["1"])
    assert time.monotonic() - started < 5


MATH = [
    (r"\frac{1}{2}", [r"\boxed{0.5}", "it is $1/2$", "so 2/4", "2"], [1, 1, 1, 0]),
    ("12", ["I get 12.", "12 or 13", "no idea", ""], [1, 0, 0, 0]),
    ("$x^2+2x+1$", [r"$(x+1)^2$", r"$(x-1)^2$"], [1, 0]),
]


@pytest.mark.parametrize(("answer", "completions", "expected"), MATH)
def test_math(answer: str, completions: list[str], expected: list[float]) -> None:
    assert said(Math(), [chat(text) for text in completions], answer=[answer] * len(completions)) == expected


def test_math_ends_a_comparison_that_takes_forever() -> None:
    started = time.monotonic()
    assert said(Math(expression_seconds=1), [r"$9^{9^{9^{9}}}+1$", "$4$"], answer=["4", "4"]) == [0, 1]
    assert time.monotonic() - started < 30


def test_math_wants_an_answer_that_it_can_read() -> None:
    with pytest.raises(DataError, match="column 'answer': 'yes, both' cannot be read as mathematics"):
        said(Math(), ["4"], answer=["yes, both"])


@pytest.mark.parametrize(
    ("path", "fields", "reason"),
    [
        ("tests.no_such:reward", {}, "ModuleNotFoundError: No module named 'tests.no_such'"),
        ("tests.reward_helpers:lenght", {}, "there is no 'lenght'\n.*did you mean 'length'"),
        ("tests.reward_helpers:FAULTS", {}, "it is a dict, not a function"),
        ("tests.reward_helpers:Calculator", {}, "not a function"),
        ("tests.unit.test_rewards:chat", {}, r"it takes \(text\), and nothing of what was answered"),
        ("tests.reward_helpers:answered", {"bonsu": 1}, "no argument `bonsu`\n.*did you mean 'bonus'"),
        ("tests.reward_helpers:answered", {"completions": []}, "`completions`, which every call brings"),
    ],
)
def test_a_function_that_cannot_serve_is_refused(path: str, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        Function(path=path, arguments=fields).open()
    assert caught.value.where == path


def test_a_function_gets_the_columns_that_it_names() -> None:
    columns = {"answer": ["4", "5"], "other": [1, 2], "completion_ids": [[1], [2]]}
    assert said(Function(path="tests.reward_helpers:answered", arguments={"bonus": 2}), ["4", "4"], **columns) == [2, 0]
    assert said(Function(path="tests.reward_helpers:length"), ["four", ""], **columns) == [4, 0]
    assert said(Function(path="tests.reward_helpers:length_later"), ["four", ""], **columns) == [4, 0]


def test_a_reward_function_of_trl_serves_unchanged() -> None:
    reward = Function(path="trl.rewards.format_rewards:think_format_reward")
    assert said(reward, [chat("<think>a</think>b"), chat("<think>a")], answer=["", ""]) == [1, 0]


def test_what_is_a_number() -> None:
    import numpy as np
    import torch

    numbers = [True, 3, -0.5, np.float32(0.25), np.int64(7), torch.tensor(1.5), 3.4e38]
    assert [number_of(value) for value in numbers] == [1.0, 3.0, -0.5, 0.25, 7.0, 1.5, 3.4e38]
    others = [None, "1", float("nan"), np.float64("inf"), 1e39, 10**400, 1j, [1.0], torch.ones(2), {}]
    assert [number_of(value) for value in others] == [None] * len(others)
