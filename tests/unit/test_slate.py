"""The value of a recommended list, term by term, by hand."""

from __future__ import annotations

from math import log, log2
from typing import Any

import pytest
from pydantic import ValidationError

from burnish.errors import DataError
from burnish.rewards.slate import Slate
from tests.events_helpers import write


def value(reward: Slate, said: str, *, history: str = "a b", future: str = "c d") -> float:
    (found,) = reward.open()(
        [history.split()], [["" if item == "-" else item for item in said.split()]], future=[future.split()]
    )
    return found


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("c d", 1.0),
        ("d c x", 1.0),  # which of the two comes first is not told
        ("x c", (1 / log2(3)) / (1 + 1 / log2(3))),
        ("c c", 1 / (1 + 1 / log2(3))),  # a second time it is worth nothing
        ("- x c", (1 / log2(4)) / (1 + 1 / log2(3))),
        ("x", 0.0),
        ("", 0.0),
    ],
)
def test_relevance_is_the_gain_of_the_best_order(said, expected):
    assert value(Slate(of="relevance"), said) == pytest.approx(expected)


def test_diversity_is_the_mean_distance_of_two_slots(tmp_path):
    table = write(tmp_path / "items.inter", "item_id:token\tclass:token_seq\nc\tdrama war\nd\tdrama\ne\tcomedy\n")
    reward = Slate(of="diversity", table=table, categories="class")
    # c and d share one of two categories; e shares none; f is in no table, and as far apart as can be
    assert value(reward, "c d") == pytest.approx(0.5)
    assert value(reward, "c d e") == pytest.approx((0.5 + 1 + 1) / 3)
    assert value(reward, "c f") == pytest.approx(1.0)
    assert value(reward, "c e c -") == pytest.approx(1 / 6)  # of six pairs of slots one is of two good ones
    assert value(reward, "c a") == 0.0  # a is history
    assert value(reward, "c") == 0.0


def test_without_a_table_diversity_is_what_is_not_repeated():
    assert value(Slate(of="diversity"), "c d e") == 1.0
    assert value(Slate(of="diversity"), "c d c") == pytest.approx(1 / 3)


def test_novelty_is_what_few_have_seen(tmp_path):
    table = write(tmp_path / "t.csv", "user,item,timestamp\n" + "1,c,0\n" * 6 + "1,d,0\n" * 2)
    reward = Slate(of="novelty", table=table)
    often, seldom = log(8 / 6) / log(8), log(8 / 2) / log(8)
    assert value(reward, "c d") == pytest.approx((often + seldom) / 2)
    assert value(reward, "d d -") == pytest.approx(seldom / 3)
    assert value(reward, "never") == 1.0
    assert value(reward, "") == 0.0


@pytest.mark.parametrize("fields", [{"of": "novelty"}, {"of": "relevance", "table": "t.csv"}, {"of": "profit"}])
def test_terms_that_make_no_sense_are_refused(fields: dict[str, Any]):
    with pytest.raises(ValidationError):
        Slate(**fields)


def test_a_table_without_what_is_read_is_refused_by_name(tmp_path):
    path = write(tmp_path / "t.csv", "user,thing\n1,c\n")
    with pytest.raises(DataError, match=r"t.csv: no column `item` or `item_id`; there are user, thing"):
        Slate(of="novelty", table=path).open()
    with pytest.raises(DataError, match="no column `categories`"):
        Slate(of="diversity", table=write(tmp_path / "i.csv", "item\nc\n")).open()
    with pytest.raises(DataError, match="no such file"):
        Slate(of="novelty", table=str(tmp_path / "none.csv")).open()
    with pytest.raises(DataError, match="no two events"):
        Slate(of="novelty", table=write(tmp_path / "e.csv", "item\nc\n")).open()


def test_only_relevance_needs_a_column():
    assert Slate(of="relevance").needed_columns == ("future",)
    assert Slate(of="diversity").needed_columns == ()
