"""Vocabularies of items: their order, their files, and their way through an export."""

from __future__ import annotations

import json

import pytest

from burnish.data.tokenizers.vocabulary import Vocabulary, items_of
from burnish.errors import DataError
from tests.events_helpers import history, rendered, vocabulary, write


def tokens(tokenizer) -> list[str]:
    return tokenizer.convert_ids_to_tokens(range(len(tokenizer)))


def test_specials_then_features_then_items(tmp_path):
    tokenizer = vocabulary(tmp_path, "b a", features={"rating": ["4", "5"]}, bos=True)
    assert tokens(tokenizer) == ["<pad>", "<bos>", "rating=4", "rating=5", "b", "a"]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, None)
    assert items_of(tokenizer) == (4, 6, {})
    assert tokenizer("a b a").input_ids == [5, 4, 5]


def test_learned_items_are_ordered_by_how_often_they_occur(tmp_path):
    # b three times; 10, 9 and a once each: shorter ids first, then by spelling
    table = write(tmp_path / "t.csv", "who,what\n1,10\n1,b\n2,b\n2,9\n3,b\n3,a\n")
    learned = Vocabulary(learn_from=[table], columns={"what": "item"})
    assert tokens(learned.open(None))[1:] == ["b", "9", "a", "10"]
    assert tokens(learned.model_copy(update={"min_count": 2}).open(None))[1:] == ["b"]


def test_codes_of_different_levels_are_different_tokens(tmp_path):
    rows = [{"item": "x", "codes": [10, 2]}, {"item": "y", "codes": [2, 2]}]
    tokenizer = Vocabulary(codes=write(tmp_path / "c.jsonl", "".join(json.dumps(r) + "\n" for r in rows))).open(None)
    assert tokens(tokenizer) == ["<pad>", "c1=2", "c1=10", "c2=2"]
    assert items_of(tokenizer) == (1, 4, {"x": ["c1=10", "c2=2"], "y": ["c1=2", "c2=2"]})


@pytest.mark.parametrize("kind", ["items", "codes"])
def test_an_export_knows_its_items(tmp_path, kind):
    from transformers import AutoTokenizer

    if kind == "items":
        tokenizer = vocabulary(tmp_path, "Toy_Story 007 <b>", features={"rating": ["5"]}, bos=True)
    else:
        rows = [{"item": "a", "codes": [1, 2]}, {"item": "b", "codes": [1, 3]}]
        path = write(tmp_path / "c.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        tokenizer = Vocabulary(codes=path, features={"rating": ["5"]}, bos=True).open(None)
    tokenizer.save_pretrained(tmp_path / "export")
    again = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert tokens(again) == tokens(tokenizer)
    assert items_of(again) == items_of(tokenizer)
    row = history("007 <b> Toy_Story" if kind == "items" else "b a b", rating=[5, 5, 5])
    before, after = (rendered(t, row, feedback=["rating"]).group.samples[0] for t in (tokenizer, again))
    assert before.token_ids.tolist() == after.token_ids.tolist()
    assert again(again.decode(after.token_ids)).input_ids == after.token_ids.tolist()


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("a\nb\na\n", ":3", "'a' is listed already"),
        ("a\n\nb\n", ":2", "item '' is empty"),
        ("a\nToy Story\n", ":2", "item 'Toy Story' is empty or holds white space"),
        ("\n", "", "holds no item"),
    ],
)
def test_a_bad_list_of_items_is_refused_at_its_line(tmp_path, text, line, reason):
    path = write(tmp_path / "items.txt", text)
    with pytest.raises(DataError) as refused:
        Vocabulary(items=path).open(None)
    assert refused.value.where == path + line
    assert reason in refused.value.reason


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ({"item": "b", "codes": [1]}, "1 codes, the items before have 2"),
        ({"item": "b", "codes": [1, 2]}, "'b' has the codes of 'a'"),
        ({"item": "a", "codes": [1, 3]}, "'a' is listed already"),
        ({"item": "b", "codes": ["x", "y"]}, "is not a list of whole numbers"),
        ({"codes": [1, 3]}, "no column `item`"),
    ],
)
def test_bad_codes_are_refused_at_their_line(tmp_path, second, reason):
    rows = [{"item": "a", "codes": [1, 2]}, second]
    path = write(tmp_path / "codes.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as refused:
        Vocabulary(codes=path).open(None)
    assert refused.value.where == f"{path}:2"
    assert reason in refused.value.reason


def test_an_item_cannot_be_spelt_like_another_token(tmp_path):
    with pytest.raises(DataError, match="'rating=5' would be two tokens"):
        vocabulary(tmp_path, "a rating=5", features={"rating": ["5"]})
    with pytest.raises(DataError, match="'<pad>' would be two tokens"):
        vocabulary(tmp_path, "<pad>")


@pytest.mark.parametrize("origins", [{}, {"items": "a.txt", "codes": "b.jsonl"}])
def test_items_have_one_origin(origins):
    with pytest.raises(ValueError, match="items come from one of"):
        Vocabulary(**origins)
