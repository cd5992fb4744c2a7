"""Where the tokens of a packed row stand."""

from __future__ import annotations

import numpy as np
import torch

from burnish.data.packing.layout import empty_block, layout
from burnish.types import Group, Sample


def sample(ids: list[int], mask: list[int], name: str, weight: float) -> Sample:
    columns = {"weight": np.array(weight, np.float32), "turn": np.arange(1, len(ids) + 1, dtype=np.int16)}
    return Sample(np.array(ids, np.int32), np.array(mask, bool), name, columns)


def test_a_row_of_a_single_document_and_a_pair() -> None:
    single = Group((sample([5, 6, 7], [0, 1, 1], "a:0", 0.5),))
    pair = Group((sample([8, 9], [0, 1], "a:1", 2.0), sample([4], [0], "a:2", 3.0)))
    block = layout([single, pair], row_length=8, num_documents=5)

    assert block.token_ids.tolist() == [5, 6, 7, 8, 9, 4, 0, 0]
    assert block.loss_mask.tolist() == [False, True, True, False, True, False, False, False]
    assert block.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    assert block.document_ids.tolist() == [0, 0, 0, 1, 1, 2, -1, -1]
    assert block.documents.tolist() == [[0, 3, 0, 0], [3, 5, 0, 0], [5, 6, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert block.group_ids.tolist() == [0, 1, 1, -1, -1]
    assert block.columns["weight"].tolist() == [0.5, 2.0, 3.0, 0.0, 0.0]
    assert block.columns["turn"].tolist() == [1, 2, 3, 1, 2, 1, 0, 0]
    assert block.sample_ids == ("a:0", "a:1", "a:2") and block.num_documents == 3 and block.num_tokens == 8
    dtypes = [block.token_ids.dtype, block.loss_mask.dtype, block.position_ids.dtype, block.document_ids.dtype]
    assert dtypes == [torch.int64, torch.bool, torch.int64, torch.int64]
    assert (block.documents.dtype, block.group_ids.dtype) == (torch.int32, torch.int64)
    assert (block.columns["weight"].dtype, block.columns["turn"].dtype) == (torch.float32, torch.int16)


def test_a_full_row_has_no_padding() -> None:
    block = layout([Group((sample([1, 2], [0, 1], "a", 1.0),)), Group((sample([3, 4], [0, 1], "b", 1.0),))], 4, 2)
    assert block.document_ids.tolist() == [0, 0, 1, 1]
    assert block.documents.tolist() == [[0, 2, 0, 0], [2, 4, 0, 0]]


def test_an_empty_row_looks_like_the_others_and_holds_nothing() -> None:
    full = layout([Group((sample([5, 6, 7], [0, 1, 1], "a:0", 0.5),))], 8, 5)
    empty = empty_block(8, 5, full.columns)
    for name in ("token_ids", "loss_mask", "position_ids", "document_ids", "documents", "group_ids"):
        assert getattr(empty, name).dtype == getattr(full, name).dtype
        assert getattr(empty, name).shape == getattr(full, name).shape
    assert not empty.token_ids.any() and not empty.loss_mask.any() and not empty.documents.any()
    assert (empty.document_ids == -1).all() and (empty.group_ids == -1).all()
    assert empty.columns["weight"].tolist() == [0.0] * 5 and empty.columns["turn"].tolist() == [0] * 8
    assert empty.num_documents == 0


def test_a_shared_prompt_stands_before_both_answers() -> None:
    def part(ids: list[int], mask: list[int], preference: int, prefix: int | None) -> Sample:
        columns = {"preference": np.array(preference, np.float32)}
        return Sample(np.array(ids, np.int32), np.array(mask, bool), "a:1", columns, prefix)

    single = Group((part([5, 6], [0, 1], 0, None),))
    pair = Group((part([7, 8, 9], [0, 0, 0], 0, None), part([1, 2], [1, 1], 1, 0), part([3], [1], -1, 0)))
    block = layout([single, pair, pair], row_length=16, num_documents=8)

    assert block.token_ids.tolist() == [5, 6, 7, 8, 9, 1, 2, 3, 7, 8, 9, 1, 2, 3, 0, 0]
    assert block.position_ids.tolist() == [0, 1, 0, 1, 2, 3, 4, 3, 0, 1, 2, 3, 4, 3, 0, 0]
    assert block.document_ids.tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 4, 4, 4, 5, 5, 6, -1, -1]
    assert block.documents.tolist() == [
        [0, 2, 0, 0],
        [2, 5, 0, 0],
        [5, 7, 2, 5],
        [7, 8, 2, 5],
        [8, 11, 0, 0],
        [11, 13, 8, 11],
        [13, 14, 8, 11],
        [0, 0, 0, 0],
    ]
    assert block.group_ids.tolist() == [0, 1, 1, 1, 2, 2, 2, -1]
    assert block.columns["preference"].tolist() == [0, 0, 1, -1, 0, 1, -1, 0]
    assert block.loss_mask.tolist() == [False, True, *[False] * 3, *[True] * 3, *[False] * 3, *[True] * 3, False, False]
