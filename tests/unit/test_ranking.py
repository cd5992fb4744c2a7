"""Ranks, recall, NDCG and reciprocal rank against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from burnish.data.packing.layout import empty_block, layout
from burnish.losses.ranking import Ranking
from burnish.model.project import project
from burnish.types import Group, previous_token
from tests.events_helpers import history, rendered, vocabulary

LOGITS = {"a": [9.0, 9.0, 0.1, 0.5, 0.3, 0.2], "b": [0.0, 0.0, 0.6, 0.7, 0.4, 0.5], "c": [0.0, 0.0, 0.9, 0.8, 0.7, 0.6]}
"""After each item the logits of <pad>, <bos>, a, b, c, d: the specials have the largest after a, and do not compete."""


def block_of(tmp_path, *histories: tuple[str, int]):
    tokenizer = vocabulary(tmp_path, "a b c d", bos=True)
    rows = [rendered(tokenizer, history(items, given)).group for items, given in histories]
    return tokenizer, layout([Group(row.samples) for row in rows], 16, 4)


def measured(tokenizer, block, logits=LOGITS, **fields):
    """Metrics as numbers; hidden states are the logits, and the head is the identity."""
    words = tokenizer.convert_ids_to_tokens(block.token_ids)
    hidden = torch.tensor([logits.get(word, [0.0] * 6) for word in words])
    loss = Ranking(**fields)
    outputs = project(
        hidden,
        torch.eye(6),
        block.token_ids,
        loss.reads(block),
        loss.needs,
        previous_T=previous_token(block),
        ranking=loss.ranking(block),
        block=block,
        chunk=2,
    )
    return loss(outputs, block)


def shares(output):
    return {name: float(total) / float(count) for name, (total, count) in output.metrics.items()}


def test_one_relevant_item_by_hand(tmp_path):
    # after a: b .5, c .3, d .2, a .1, so c has rank 1;  after b: b .7, a .6, d .5, c .4, so a has rank 1 and c rank 3
    tokenizer, block = block_of(tmp_path, ("b a c", 2), ("a b a", 2), ("a b c", 2))
    found = shares(measured(tokenizer, block, k=[1, 2, 4]))
    assert found == pytest.approx(
        {
            "mrr": (1 / 2 + 1 / 2 + 1 / 4) / 3,
            "recall@1": 0.0,
            "ndcg@1": 0.0,
            "recall@2": 2 / 3,
            "ndcg@2": 2 / math.log2(3) / 3,
            "recall@4": 1.0,
            "ndcg@4": (2 / math.log2(3) + 1 / math.log2(5)) / 3,
        }
    )


def test_items_of_the_history_can_be_left_out(tmp_path):
    # after b: without b, a and d, which were there, c is the best
    tokenizer, block = block_of(tmp_path, ("d a b c", 3))
    assert shares(measured(tokenizer, block))["mrr"] == pytest.approx(1 / 4)
    assert shares(measured(tokenizer, block, exclude_seen=True))["mrr"] == 1.0
    # what is chosen again is never left out itself: after b it is second to b, which is left out
    tokenizer, block = block_of(tmp_path, ("a b a", 2))
    assert shares(measured(tokenizer, block, exclude_seen=True))["mrr"] == 1.0


def test_the_loss_is_the_likelihood_of_the_same_tokens(tmp_path):
    tokenizer, block = block_of(tmp_path, ("a b", 1), ("b c", 1))
    expected = sum(-torch.tensor(LOGITS[before]).log_softmax(0)[token].item() for before, token in (("a", 3), ("b", 4)))
    assert measured(tokenizer, block).total.item() == pytest.approx(expected)


def test_a_model_that_says_nothing_is_not_perfect(tmp_path):
    tokenizer, block = block_of(tmp_path, ("a b", 1))
    # four items tie: (4 - 1) / 2 = rank 1.5, as chance would have it
    assert shares(measured(tokenizer, block, logits={}))["mrr"] == pytest.approx(1 / 2.5)
    broken = {"a": [math.nan] * 6}
    assert shares(measured(tokenizer, block, logits=broken, k=[3]))["recall@3"] == 0.0


def test_rows_without_items_rank_all_tokens(tmp_path):
    tokenizer, block = block_of(tmp_path, ("d a c", 2))
    del block.columns["item_start"], block.columns["item_end"]
    assert shares(measured(tokenizer, block))["mrr"] == pytest.approx(1 / 4)  # <pad> and <bos> are before b and c


def test_padding_counts_nothing(tmp_path):
    tokenizer, block = block_of(tmp_path, ("a b", 1))
    output = measured(tokenizer, empty_block(16, 4, block.columns))
    assert {float(value) for pair in output.metrics.values() for value in pair} == {0.0}
