"""Groups of queries and documents, packed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from burnish.types import Block
from tests.policy_model_helpers import pack

Documents = Sequence[tuple[int, list[int]]]
"""(role, token ids): role 0 is a query, 1 a positive, 2 a negative."""


def pack_groups(groups: Sequence[Documents], row_length: int, max_documents: int = 12) -> Block:
    """A row of groups, each a query with its positive and its negatives."""
    documents = [(index, role, tokens) for index, group in enumerate(groups) for role, tokens in group]
    block = pack([tokens for _, _, tokens in documents], row_length, max_documents)
    role_D, weight_D = torch.zeros(max_documents), torch.zeros(max_documents)
    group_ids = torch.full((max_documents,), -1)
    for place, (index, role, _) in enumerate(documents):
        role_D[place], weight_D[place], group_ids[place] = role, 1.0, index
    return replace(block, group_ids=group_ids, columns={"role": role_D, "weight": weight_D})
