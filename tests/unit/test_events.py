"""Member histories: from tables and rows to token ids with a mask."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from burnish.data.sources.events import Events, Span, spans
from burnish.data.sources.interactions import moment
from burnish.errors import DataError
from burnish.losses.info_nce import InfoNCE
from burnish.recipe.schema import Recipe
from burnish.types import RowFormat
from tests.events_helpers import history, rendered, vocabulary, write

TABLE = "user_id,item_id,rating,timestamp\n1,a,5,30\n2,b,4,10\n1,b,3,10\n1,c,4,20\n2,a,1,10\n"
"""User 1: b, c, a by time; user 2: b, a, which have the same time and stand in the file's order."""


def items(row) -> str:
    return " ".join(event["item"] for event in row.record["events"])


def test_a_table_is_grouped_by_user_and_ordered_by_time(tmp_path):
    table = Events(path=write(tmp_path / "t.csv", TABLE)).open()
    assert len(table) == 2
    first, second = table.rows([0, 1])
    assert (items(first), items(second)) == ("b c a", "b a")
    assert first.record["events"][0] == {"item": "b", "rating": "3", "timestamp": 10.0}
    assert first.where == f"{tmp_path}/t.csv:4, user 1"  # the line of its first event
    assert first.record["places"][2] == f"{tmp_path}/t.csv:2"


def test_every_kind_of_table_says_the_same(tmp_path):
    rows = [dict(zip(("user_id", "item_id", "timestamp"), line, strict=True)) for line in ((1, 7, 2.0), (1, 8, 1.0))]
    write(tmp_path / "t.inter", "user_id:token\titem_id:token\ttimestamp:float\n1\t7\t2\n1\t8\t1\n")
    write(tmp_path / "t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    write(tmp_path / "t.tsv", "movie\tuser\ttimestamp\n7\t1\t2000-01-01 10:00:02\n8\t1\t2000-01-01 10:00:01\n")
    for name, columns in (("t.inter", {}), ("t.jsonl", {}), ("t.parquet", {}), ("t.tsv", {"movie": "item"})):
        (row,) = Events(path=str(tmp_path / name), columns=columns).open().rows([0])
        assert (row.record["user"], items(row)) == ("1", "8 7"), name


def test_quotation_marks_in_an_inter_file_mean_themselves(tmp_path):
    path = write(tmp_path / "t.inter", 'user_id:token\titem_id:token\ttitle:token_seq\n1\t7\t"Scream\n1\t8\tAlien\n')
    (row,) = Events(path=path).open().rows([0])
    assert [event["title"] for event in row.record["events"]] == ['"Scream', "Alien"]


def test_leave_last_out():
    assert spans(6, "train", None) == [Span(0, 4, 0)]
    assert spans(6, "valid", None) == [Span(0, 5, 4)]  # events 0..3 are given, 4 is predicted
    assert spans(6, "test", None) == [Span(0, 6, 5)]
    assert spans(1, "train", None) == [Span(0, 0, 0)]
    assert spans(1, "test", None) == [Span(0, 1, 0)]


@pytest.mark.parametrize("length", range(3, 40))
@pytest.mark.parametrize("window", [2, 5, 8])
def test_windows_predict_every_event_once(length, window):
    predicted = [event for start, end, given in spans(length, "all", window) for event in range(start + given, end)]
    assert predicted == list(range(length))
    assert all(end - start <= window for start, end, _ in spans(length, "all", window))
    # and each but the first window's from at least half a window before it
    assert all(given >= window // 2 for _, _, given in spans(length, "all", window)[1:])


def test_the_core_leaves_out_users_and_items_until_all_have_enough(tmp_path):
    # c has one event; without it user 3 has one; without user 3, b has one; without b user 2 has one: a remains, twice.
    text = "user,item\n1,a\n1,a\n2,b\n2,a\n3,b\n3,c\n"
    table = Events(path=write(tmp_path / "t.csv", text), min_user_events=2, min_item_events=2).open()
    assert [(row.record["user"], items(row)) for row in table.rows(range(len(table)))] == [("1", "a a")]


def test_rows_that_are_histories_already(tmp_path):
    rows = [
        {"user": "x", "items": ["a", "b", "c"], "timestamps": [1, 2, 3], "ratings": [5, 4, 3]},
        {"user": "y", "events": [{"item_id": 4}, {"item_id": 5}]},
    ]
    path = write(tmp_path / "h.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    first, second = Events(path=path, part="test").open().rows([0, 1])
    assert first.record["events"][2] == {"item": "c", "timestamp": 3.0, "rating": 3}
    assert (first.record["given"], first.where) == (2, f"{path}:1")
    assert items(second) == "4 5"
    table = Events(path=path, window=2).open()  # x: a b, then c after b; y: one
    assert [(items(row), row.record["given"]) for row in table.rows([0, 1, 2])] == [("a b", 0), ("b c", 1), ("4 5", 0)]


@pytest.mark.parametrize(
    ("name", "text", "place", "reason"),
    [
        ("t.csv", "user,item\n1,a\n1\n", ":3", "1 columns, the header has 2"),
        ("t.csv", "user,product\n1,a\n", ":2", "no column `item`; there are user, product"),
        ("t.csv", "user,item\n1,\n", ":2", "item: '' is not an id"),
        ("t.csv", "user,item,timestamp\n1,a,soon\n", ":2", "timestamp: 'soon' is not a time"),
        ("t.jsonl", '{"user": 1, "item": "a", "timestamp": 1}\n{"user": 1, "item": "b"}\n', ":2", "some have none"),
        ("t.jsonl", '{"user": 1, "item": ["a"]}\n', ":1", "item: ['a'] is not an id"),
        ("t.csv", "user,item\n", "", "holds no history"),
        ("t.dat", "1::2\n", "", "a table of events ends in one of .csv"),
    ],
)
def test_a_bad_table_is_refused_at_its_line(tmp_path, name, text, place, reason):
    path = write(tmp_path / name, text)
    with pytest.raises(DataError) as refused:
        Events(path=path).open()
    assert refused.value.where == path + place
    assert reason in refused.value.reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"items": ["a", "b"], "timestamps": [2, 1]}, "event 1 is from before event 0: timestamp 1"),
        ({"items": ["a", "b"], "timestamps": [2]}, "its lists are of different lengths: 2 items, 1 timestamps"),
        ({"items": "a b"}, "the row is not a history"),
    ],
)
def test_a_bad_history_is_refused_at_its_line(tmp_path, row, reason):
    path = write(tmp_path / "h.jsonl", '{"items": ["a", "b"]}\n' + json.dumps(row) + "\n")
    with pytest.raises(DataError) as refused:
        Events(path=path).open().rows([0, 1])
    assert (refused.value.where, refused.value.reason) == (f"{path}:2", reason)


def test_histories_have_no_core(tmp_path):
    path = write(tmp_path / "h.jsonl", '{"items": ["a", "b"]}\n')
    with pytest.raises(DataError, match="count the events of a table, and these rows are histories"):
        Events(path=path, min_item_events=2).open()


def test_a_time_without_a_zone_is_utc():
    assert moment("1970-01-02", "t.csv:2") == moment("1970-01-02T01:00+01:00", "t.csv:2") == 86400


def test_histories_out_of_order_can_be_sorted(tmp_path):
    path = write(tmp_path / "h.jsonl", '{"items": ["a", "b", "c"], "timestamps": [3, 1, 2]}\n')
    (row,) = Events(path=path, unordered="sort").open().rows([0])
    assert items(row) == "b c a"


def test_items_are_predicted_from_those_before_them(tmp_path):
    result = rendered(vocabulary(tmp_path), history("b a c"))  # <pad> 0, a 1, b 2, c 3
    (sample,) = result.group.samples
    assert sample.token_ids.tolist() == [2, 1, 3]
    assert sample.loss_mask.tolist() == [False, True, True]
    assert {name: column.item() for name, column in sample.columns.items()} == {
        "weight": 1.0,
        "item_start": 1,
        "item_end": 7,
    }
    assert result.fates == {"trained": 2, "masked": 1}


def test_only_what_is_not_given_is_predicted(tmp_path):
    (sample,) = rendered(vocabulary(tmp_path), history("b a c", given=2)).group.samples
    assert sample.loss_mask.tolist() == [False, False, True]


def test_features_stand_before_and_after_an_item(tmp_path):
    tokenizer = vocabulary(tmp_path, features={"rating": ["1", "2"], "device": ["tv", "phone"]}, bos=True)
    row = history("b a", rating=[2, 1.0], device=[["tv", "phone"], "tv"])
    (sample,) = rendered(tokenizer, row, context=["device"], feedback=["rating"]).group.samples
    # the rating of the last event is left out: nothing comes after it
    assert tokenizer.decode(sample.token_ids) == "<bos> device=tv device=phone b rating=2 device=tv a"
    assert sample.loss_mask.tolist() == [False, False, False, True, False, False, True]


def test_a_longer_history_keeps_its_end(tmp_path):
    tokenizer = vocabulary(tmp_path, bos=True)
    result = rendered(tokenizer, history("a b c d e", given=4), max_events=3)
    (sample,) = result.group.samples
    assert tokenizer.decode(sample.token_ids) == "c d e"  # without <bos>: this is not its beginning
    assert sample.loss_mask.tolist() == [False, False, True]
    assert result.fates == {"truncated": 2, "masked": 2, "trained": 1}


def test_semantic_ids_are_several_tokens_an_item(tmp_path):
    codes = "".join(json.dumps({"item": i, "codes": c}) + "\n" for i, c in (("a", [1, 0]), ("b", [0, 1])))
    from burnish.data.tokenizers.vocabulary import Vocabulary

    tokenizer = Vocabulary(codes=write(tmp_path / "codes.jsonl", codes)).open(None)
    (sample,) = rendered(tokenizer, history("a b")).group.samples
    assert tokenizer.decode(sample.token_ids) == "c1=1 c2=0 c1=0 c2=1"
    assert sample.loss_mask.tolist() == [False, False, True, True]


def test_unknown_items_and_features_are_refused_or_dropped(tmp_path):
    tokenizer = vocabulary(tmp_path, features={"rating": ["1"]})
    row = history("a x b c", given=3)
    refusal = rendered(tokenizer, row).refusal
    assert (refusal.where, refusal.reason) == ("table.csv:2, user 7, event 1", "item 'x' is not in the vocabulary")
    result = rendered(tokenizer, row, unknown="drop")
    (sample,) = result.group.samples
    assert (sample.token_ids.tolist(), sample.loss_mask.tolist()) == ([2, 3, 4], [False, False, True])
    assert result.fates == {"dropped: unknown item": 1, "masked": 2, "trained": 1}
    wrong = rendered(tokenizer, history("a b", rating=["1", "9"]), feedback=["rating"]).refusal
    assert wrong.reason == "feature 'rating=9' is not in the vocabulary"
    # what was to be predicted is unknown: nothing is left of the row
    result = rendered(tokenizer, history("a b x", given=2), unknown="drop")
    assert (result.group, result.refusal) == (None, None)
    assert result.fates == {"dropped: unknown item": 1, "dropped: nothing to predict": 2}


def test_an_unknown_item_of_a_table_is_named_by_its_own_line(tmp_path):
    (row,) = Events(path=write(tmp_path / "t.csv", "user,item\n1,a\n1,b\n1,x\n")).open().rows([0])
    assert rendered(vocabulary(tmp_path), row).refusal.where == f"{tmp_path}/t.csv:4"


@pytest.mark.parametrize(
    ("items", "reason"),
    [("", "the history is empty"), ("a", "the history has nothing to predict: 1 event, 1 of them given")],
)
def test_short_histories_are_refused_or_counted(tmp_path, items, reason):
    tokenizer = vocabulary(tmp_path)
    refusal = rendered(tokenizer, history(items)).refusal
    assert (refusal.where, refusal.reason) == ("table.csv:2, user 7", reason)
    result = rendered(tokenizer, history(items), short="drop")
    assert (result.group, result.refusal) == (None, None)
    assert result.fates == {"dropped: nothing to predict": len(items)}


def test_with_a_beginning_one_event_is_enough(tmp_path):
    (sample,) = rendered(vocabulary(tmp_path, bos=True), history("a")).group.samples
    assert (sample.token_ids.tolist(), sample.loss_mask.tolist()) == ([1, 2], [False, True])


def test_what_does_not_fit_is_refused_when_it_is_opened(tmp_path, tiny_model: Path):
    from transformers import AutoTokenizer

    from burnish.data.renderers.chat import Chat
    from burnish.data.renderers.events import Events as Renderer

    tokenizer = vocabulary(tmp_path, features={"rating": ["1"]})
    with pytest.raises(DataError, match="no feature `ratings`\n  cure: did you mean `rating`"):
        Renderer(context=["ratings"]).open(tokenizer)
    with pytest.raises(DataError, match="rows of retrieval data, not histories"):
        Renderer().open(tokenizer, RowFormat(InfoNCE.rows))
    text = AutoTokenizer.from_pretrained(tiny_model)
    with pytest.raises(DataError, match="not a vocabulary of items"):
        Renderer().open(text)
    with pytest.raises(DataError, match="histories, which have no chat template"):
        Chat().open(text, RowFormat("history"))


def test_a_measure_cannot_be_minimised(tmp_path):
    from burnish.recipe.checks import minimised

    recipe = Recipe.model_validate(
        {
            "workflow": {"type": "sft", "loss": {"type": "ranking"}},
            "model": {"config": {"model_type": "llama"}},
            "data": {"train": [{"type": "events", "path": "t.csv"}]},
            "num_steps": 1,
            "run_dir": "run",
        }
    )
    (misfit,) = minimised(recipe)
    assert misfit.path == ("workflow", "loss")
    assert "has no gradient" in misfit.reason
