"""Sums of per-token vectors by document and by group: what losses on whole answers are made of.

Sums are float64: the log-probability of an answer of 1000 tokens is near -1000, where float32 steps by 6e-5 and the
order of the tokens' addition would show in a preference loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.types import Block


def by_document(vector_T: Tensor, block: Block) -> Tensor:
    """float64 [D]: the sum over each document's own tokens; a shared prefix is a document of its own. 0 for unused
    entries."""
    return _summed(vector_T, block.document_ids, block.documents.shape[0])


def by_group(vector_D: Tensor, block: Block) -> Tensor:
    """float64 [D]: the sum over each group's documents, at the group's number; there are at most D groups."""
    return _summed(vector_D, block.group_ids, block.documents.shape[0])


def to_tokens(vector_D: Tensor, block: Block) -> Tensor:
    """[T]: each token's document's value; 0 on padding."""
    return vector_D[block.document_ids.clamp(min=0)] * (block.document_ids >= 0)


def at_last_tokens(scores_TL: Tensor, block: Block) -> Tensor:
    """[D, L]: what stands at each document's last token; 0 for unused entries."""
    start, end = block.documents[:, 0].long(), block.documents[:, 1].long()
    return scores_TL[(end - 1).clamp(min=0)] * (end > start).unsqueeze(1)


def labelled(block: Block, column: str) -> Tensor:
    """bool [D]: the documents that have a label in `column`, which is NaN where a row has none."""
    return (block.documents[:, 1] > block.documents[:, 0]) & ~block.columns[column].isnan()


def trained_weight(block: Block) -> Tensor:
    """float32 [T]: the weight of each trained token's document, from the column `weight`, or 1 without that; else 0."""
    trained = block.loss_mask.float()
    return trained * to_tokens(block.columns["weight"].float(), block) if "weight" in block.columns else trained


def _summed(values: Tensor, owners: Tensor, size: int) -> Tensor:
    total = values.new_zeros(size).double()
    return total.index_add(0, owners.clamp(min=0), values.double() * (owners >= 0))
