"""Blocks laid end to end."""

from __future__ import annotations

import torch

from burnish.types import Block, collate


def block(first: int, documents: list[list[int]], group_ids: list[int], names: tuple[str, ...]) -> Block:
    document_ids = torch.full((6,), -1)
    for number, (start, end, _, _) in enumerate(documents):
        document_ids[start:end] = number
    return Block(
        token_ids=torch.arange(first, first + 6),
        loss_mask=torch.tensor([False, True, True, False, True, False]),
        position_ids=torch.tensor([0, 1, 2, 0, 1, 0]),
        document_ids=document_ids,
        documents=torch.tensor(documents, dtype=torch.int32),
        group_ids=torch.tensor(group_ids),
        columns={"weight": torch.full((len(documents),), float(first)), "old": torch.full((6,), first)},
        sample_ids=names,
    )


def test_collate_shifts_documents_and_keeps_unused_entries_zero() -> None:
    a = block(10, [[0, 3, 0, 0], [3, 5, 0, 0], [0, 0, 0, 0]], [0, 1, -1], ("a", "b"))
    b = block(20, [[0, 2, 0, 0], [2, 4, 0, 2], [4, 6, 0, 2]], [0, 0, 0], ("c", "d", "e"))
    both = collate([a, b])

    assert both.token_ids.tolist() == [*range(10, 16), *range(20, 26)]
    assert both.documents.dtype == torch.int32
    assert both.documents.tolist() == [
        [0, 3, 0, 0],
        [3, 5, 0, 0],
        [0, 0, 0, 0],
        [6, 8, 0, 0],
        [8, 10, 6, 8],  # its prefix is the first document of the second row
        [10, 12, 6, 8],
    ]
    assert both.document_ids.tolist() == [0, 0, 0, 1, 1, -1, 3, 3, 4, 4, 5, 5]
    assert both.group_ids.tolist() == [0, 1, -1, 2, 2, 2]
    assert both.position_ids.tolist() == [0, 1, 2, 0, 1, 0] * 2
    assert both.columns["weight"].tolist() == [10.0] * 3 + [20.0] * 3
    assert both.columns["old"].tolist() == [10] * 6 + [20] * 6
    assert both.sample_ids == ("a", "b", "c", "d", "e") and both.num_documents == 5


def test_collate_goes_over_empty_rows() -> None:
    empty = block(0, [[0, 0, 0, 0]] * 3, [-1, -1, -1], ())
    b = block(20, [[0, 2, 0, 0], [2, 4, 0, 2], [4, 6, 0, 2]], [0, 0, 0], ("c", "d", "e"))
    both = collate([empty, b])
    assert both.documents[:3].tolist() == [[0, 0, 0, 0]] * 3
    assert both.documents[3:].tolist() == [[6, 8, 0, 0], [8, 10, 6, 8], [10, 12, 6, 8]]
    assert both.group_ids.tolist() == [-1, -1, -1, 0, 0, 0]
    assert both.document_ids.tolist() == [-1] * 6 + [3, 3, 4, 4, 5, 5]


def test_a_document_id_names_its_entry_in_documents() -> None:
    """In rows laid end to end too: entry document_ids[t] of `documents` is the span that t lies in."""
    a = block(10, [[0, 3, 0, 0], [3, 5, 0, 0], [0, 0, 0, 0]], [0, 1, -1], ("a", "b"))
    both = collate([a, a, a])
    for t, document in enumerate(both.document_ids.tolist()):
        if document >= 0:
            start, end = both.documents[document, :2].tolist()
            assert start <= t < end
