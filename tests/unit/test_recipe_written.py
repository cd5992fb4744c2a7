"""YAML 1.2 and overrides to plain data with places."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from burnish.errors import RecipeError
from burnish.recipe.written import Written, read

RECIPE = """\
# a comment
model:
  path: x        # line 3
data:
  train:
    - {type: jsonl, path: a}
    - type: jsonl
      path: b    # line 8
num_steps: 3
"""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2.0e-4", 2e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("010", 10),
        ("-7", -7),
        ("0x1F", 31),
        ("0o17", 15),
        ("on", "on"),
        ("yes", "yes"),
        ("No", "No"),
        ("True", True),
        ("false", False),
        ("~", None),
        ("", None),
        ("'12'", "12"),
        ("2026-01-31", "2026-01-31"),
        ("12:30:45", "12:30:45"),
        ("1.2.3", "1.2.3"),
        (r'"\ud83d\ude00"', "\U0001f600"),  # as JSON, and so every recipe.json, writes it
    ],
)
def test_scalars_mean_what_yaml_1_2_says(text, value):
    read_value = Written(f"key: {text}", "r.yaml").data["key"]
    assert (read_value, type(read_value)) == (value, type(value))


def test_half_a_character_is_refused():
    written = Written(r'key: "\ud83d"', "r.yaml")
    assert [str(problem) for problem in written.problems] == [r"r.yaml:1: key: cannot read '\ud83d' as str"]


def test_every_key_has_its_line():
    written = Written(RECIPE, "r.yaml")
    assert written.place(("model", "path")) == "r.yaml:3"
    assert written.place(("data", "train", 1, "path")) == "r.yaml:8"
    assert written.place(("model", "missing", "deeper")) == "r.yaml:2"
    assert written.place(("missing",)) == "r.yaml"


def test_keys_given_twice_are_refused_with_both_lines_and_the_rest_is_read():
    written = Written("a: 1\nb: {c: 1, c: 2}\na: 3\n", "r.yaml")
    assert [(problem.where, problem.reason) for problem in written.problems] == [
        ("r.yaml:2", "b.c: given twice, first at r.yaml:2"),
        ("r.yaml:3", "a: given twice, first at r.yaml:1"),
    ]


def test_anchors_are_copies():
    written = Written("a: &x {k: 1}\nb: *x\n", "r.yaml")
    written.override("b.k=2")
    assert written.data == {"a": {"k": 1}, "b": {"k": 2}}


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("a: 1\nb: [1, 2\n", ":3", "not YAML"),
        ("a: 1\n b: 2\n", ":2", "not YAML"),
        ("a: {b: *nowhere}\n", ":1", "undefined alias"),
        ("", "", "the recipe is empty"),
        ("- a\n- b\n", "", "a recipe is a block of keys"),
        ("a: 1\n---\nb: 2\n", ":2", "not YAML"),
        ("a: &x [*x]\n", ":1", "more than 32 blocks deep"),
        ("a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(8)
        ), ":1", "more than 10000 values"),
        ("a: " + "[" * 2000, "", "not YAML"),
    ],
)  # fmt: skip
def test_what_is_no_data_is_refused_at_its_line(text, line, said):
    with pytest.raises(RecipeError) as caught:
        Written(text, "r.yaml")
    assert said in caught.value.reason
    assert caught.value.where == f"r.yaml{line}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: !!python/name:os.system x", "cannot read 'x' as"),
        ("a: !custom x", "cannot read 'x' as !custom"),
        ("a: !!int abc", "cannot read 'abc' as int"),
        ("a: !!bool yes", "cannot read 'yes' as bool"),
        ("1: x", "a key must be text"),
        ("true: x", "a key must be text"),
        ("? [a]\n: x", "a key must be text"),
        ("a: &a {k: 1}\nb: {<<: *a}", "merge keys"),
    ],
)
def test_what_a_recipe_has_no_use_for_is_a_problem(text, said):
    [problem] = Written(text, "r.yaml").problems
    assert said in problem.reason


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path):
    (tmp_path / "r.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(RecipeError, match="not UTF-8"):
        read(tmp_path / "r.yaml")


def overridden(*overrides: str) -> Written:
    written = Written(RECIPE, "r.yaml")
    for override in overrides:
        written.override(override)
    return written


def test_overrides_replace_create_and_append():
    written = overridden(
        "num_steps=1e1",
        "data.train.0.path=z=z",
        "data.packing={type: none}",
        "model.adapter.r=8",
        "data.train.2={type: parquet}",
        "data.eval.0.path=e",
        "track=[]",
        "run_dir=",
    )
    assert not written.problems
    assert written.data == {
        "model": {"path": "x", "adapter": {"r": 8}},
        "data": {
            "train": [{"type": "jsonl", "path": "z=z"}, {"type": "jsonl", "path": "b"}, {"type": "parquet"}],
            "packing": {"type": "none"},
            "eval": [{"path": "e"}],
        },
        "num_steps": 10.0,
        "track": [],
        "run_dir": None,
    }


def test_overrides_are_places():
    written = overridden("model.adapter.r=8", "data.train=[{type: jsonl}]")
    assert written.place(("model", "adapter", "r")) == "override 'model.adapter.r=8'"
    assert written.place(("model", "adapter", "type")) == "override 'model.adapter.r=8'"
    assert written.place(("model", "path")) == "r.yaml:3"
    assert written.place(("data", "train", 0, "path")) == "override 'data.train=[{type: jsonl}]'"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("num_steps", "not of the form key.path=value"),
        ("=3", "not of the form key.path=value"),
        ("a..b=3", "not of the form key.path=value"),
        ("num_steps.x=3", "`num_steps` is a value, not a block; it has no `x`"),
        ("data.train.x=3", "`data.train` is a list of 2, numbered from 0; it has no `x`"),
        ("data.train.3.path=3", "`data.train` is a list of 2, numbered from 0; it has no `3`"),
        ("data.0=3", "`data` is a block of keys, not a list; it has no `0`"),
        ("0=3", "the recipe is a block of keys, not a list; it has no `0`"),
        ("seed=[1", "not YAML"),
        ("seed={a: 1, a: 2}", "seed.a: given twice"),
    ],
)
def test_overrides_that_lead_nowhere_are_problems_named_by_themselves(override, said):
    [problem] = overridden(override).problems
    assert said in problem.reason
    assert problem.where == f"override '{override}'"
