"""A hand-laid block that losses are computed on by hand."""

from __future__ import annotations

import torch

from burnish.types import Block


def two_documents(**columns: torch.Tensor) -> Block:
    """Documents of 3 and 2 tokens with 2 and 1 trained, then one slot of padding."""
    return Block(
        token_ids=torch.tensor([5, 6, 7, 8, 9, 0]),
        loss_mask=torch.tensor([False, True, True, False, True, False]),
        position_ids=torch.tensor([0, 1, 2, 0, 1, 0]),
        document_ids=torch.tensor([0, 0, 0, 1, 1, -1]),
        documents=torch.tensor([[0, 3, 0, 0], [3, 5, 0, 0], [0, 0, 0, 0]], dtype=torch.int32),
        group_ids=torch.tensor([0, 1, -1]),
        columns=columns,
        sample_ids=("a", "b"),
    )
