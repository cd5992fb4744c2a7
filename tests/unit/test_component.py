"""Components: found by folder, validated strictly, compared for a resume."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import ValidationError

from burnish.component import Component, Config, Free, OneOf, differences, fixed_view

BASE = """
from __future__ import annotations
from burnish.component import Component
class Shape(Component):
    scale: float = 1.0
"""
SQUARE = """
from __future__ import annotations
from typing import Literal
from shapes.base import Shape
class Square(Shape):
    type: Literal["square"] = "square"
    size: int = 1
    corners: tuple[float, float] = (0.0, 0.5)
"""
BROKEN = """
type: Literal["broken"] = "broken"
raise RuntimeError("imported, though nobody chose it")
"""
OWN = """
from __future__ import annotations
from shapes.base import Shape
class Star(Shape):
    points: int = 5
class NotAShape: ...
"""


@pytest.fixture
def holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A config class with one field that is a shape."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    files = {"__init__": "", "base": BASE, "square": SQUARE, "broken": BROKEN, "helper": "import nothing_like_it"}
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    (tmp_path / "my_shapes.py").write_text(OWN)
    (tmp_path / "half_written.py").write_text("class Star(:")
    monkeypatch.syspath_prepend(tmp_path)
    from shapes.base import Shape  # pyright: ignore[reportMissingImports]

    shapes = OneOf("shapes", default="square")

    class Holder(Config):
        shape: Annotated[Shape, shapes] = shapes.field(Shape)  # pyright: ignore[reportInvalidTypeForm]
        others: list[Annotated[Shape, shapes]] = []  # pyright: ignore[reportInvalidTypeForm]

    # Annotations are text here and Shape is local, so pydantic is told what it is.
    Holder.model_rebuild(_types_namespace={"Shape": Shape, "shapes": shapes, "Annotated": Annotated})
    yield Holder
    for name in [name for name in sys.modules if name.split(".")[0] in ("shapes", "my_shapes")]:
        del sys.modules[name]


def reason(holder: Any, data: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as caught:
        holder.model_validate(data)
    return caught.value.errors()[0]["msg"]


def test_a_type_is_a_file_and_only_that_file_is_imported(holder):
    assert holder.model_validate({"shape": {"type": "square", "size": 3}}).shape.size == 3
    assert "shapes.broken" not in sys.modules


def test_files_without_the_type_line_are_helpers():
    assert OneOf("burnish.schedules").types() == ["constant", "cosine", "linear", "wsd"]


def test_helpers_beside_components_are_no_choices(holder):
    assert "one of: broken, square, module:Class" in reason(holder, {"shape": {"type": "helper"}})


def test_without_a_type_the_default_is_meant(holder):
    assert holder.model_validate({"shape": {"size": 4}}).shape.type == "square"
    assert holder.model_validate({}).shape.size == 1


def test_a_misspelt_type_is_named_with_the_nearest(holder):
    assert reason(holder, {"shape": {"type": "sqare"}}).startswith("no type 'sqare', did you mean 'square'?")


def test_a_value_that_is_no_block_is_refused_with_an_example(holder):
    assert reason(holder, {"shape": 3}) == "expected a block such as {type: square}"


def test_errors_inside_a_component_carry_the_whole_path(holder):
    with pytest.raises(ValidationError) as caught:
        holder.model_validate({"others": [{"type": "square"}, {"type": "square", "size": "x"}]})
    assert caught.value.errors()[0]["loc"] == ("others", 1, "size")


def test_a_users_class_is_validated_and_comes_back(holder):
    value = holder.model_validate({"shape": {"type": "my_shapes:Star", "points": 7, "scale": 2}})
    assert (value.shape.points, value.shape.scale) == (7, 2.0)
    saved = value.model_dump(mode="json")
    assert saved["shape"] == {"type": "my_shapes:Star", "scale": 2.0, "points": 7}
    assert holder.model_validate(saved) == value


def test_a_users_class_is_validated_strictly(holder):
    assert "valid integer" in reason(holder, {"shape": {"type": "my_shapes:Star", "points": "7"}})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("my_shapes:Stern", "cannot import 'my_shapes:Stern'"),
        ("no_such_module:Star", "cannot import 'no_such_module:Star'"),
        ("half_written:Star", "cannot import 'half_written:Star': SyntaxError: "),
        (".my_shapes:Star", "cannot import '.my_shapes:Star': TypeError: "),
        ("my_shapes:NotAShape", "is not a subclass of shapes.base.Shape"),
    ],
)
def test_a_users_class_that_will_not_do_is_refused(holder, name, said):
    assert said in reason(holder, {"shape": {"type": name}})


def test_tuples_come_back_from_json(holder):
    value = holder.model_validate({"shape": {"corners": [1, 0.25]}})
    assert value.shape.corners == (1.0, 0.25)
    assert holder.model_validate(value.model_dump(mode="json")) == value


class Scalars(Config):
    whole: int = 0
    number: float = 0.0
    switch: bool = False
    text: str = ""


@pytest.mark.parametrize(
    "given",
    [
        {"whole": "12"},
        {"whole": 1.0},
        {"whole": True},
        {"number": "1e-4"},
        {"number": True},
        {"number": float("inf")},
        {"switch": "yes"},
        {"switch": 1},
        {"text": 3},
        {"wholes": 3},
    ],
)
def test_nothing_is_taken_for_what_it_is_not(given):
    with pytest.raises(ValidationError):
        Scalars.model_validate(given)


def test_an_integer_is_a_number():
    assert Scalars.model_validate({"number": 32}).number == 32.0


def test_configs_are_frozen():
    with pytest.raises(ValidationError):
        Scalars().whole = 3  # pyright: ignore[reportAttributeAccessIssue]


class Inner(Config):
    kept: int = 1
    cache: Annotated[int, Free()] = 2


class Outer(Config):
    inner: Inner = Inner()
    many: list[Inner] = []
    place: Annotated[str, Free()] = "here"


def test_fixed_view_leaves_out_what_is_free_at_any_depth():
    outer = Outer(many=[Inner(), Inner(kept=5)])
    assert fixed_view(outer, outer.model_dump()) == {"inner": {"kept": 1}, "many": [{"kept": 1}, {"kept": 5}]}


def test_fixed_view_of_older_data_with_other_keys_and_lengths():
    saved = {"inner": {"kept": 1, "gone": 9}, "many": [{"kept": 1, "cache": 0}, {"kept": 2, "cache": 0}], "place": "x"}
    expected = {"inner": {"kept": 1, "gone": 9}, "many": [{"kept": 1}, {"kept": 2, "cache": 0}]}
    assert fixed_view(Outer(many=[Inner()]), saved) == expected


def test_differences_name_every_leaf():
    old = {"a": {"b": 512, "c": "x"}, "l": [1, 2], "same": None, "gone": True}
    new = {"a": {"b": 1024, "c": "x"}, "l": [1, 3, {"d": 4}], "same": None, "new": 0.5}
    assert differences(old, new) == [
        "a.b: 512 -> 1024",
        "l.1: 2 -> 3",
        'l.2: (absent) -> {"d":4}',
        "gone: true -> (absent)",
        "new: (absent) -> 0.5",
    ]


def test_json_schema_has_a_choice_for_each_file_and_marks_what_is_free():
    class Run(Config):
        schedule: Annotated[Component, OneOf("burnish.schedules"), Free()]

    schema = Run.model_json_schema()["properties"]["schedule"]
    assert schema["resume"] == "free"
    assert [choice["properties"]["type"].get("const") for choice in schema["anyOf"]] == [
        "constant",
        "cosine",
        "linear",
        "wsd",
        None,
    ]
    assert "pattern" in schema["anyOf"][-1]["properties"]["type"]
