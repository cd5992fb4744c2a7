"""Packed rows by hand and the plain transformers model to compare them with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from burnish.model.policy_model import PolicyModel
from burnish.types import Block


def pack(documents: list[list[int]], row_length: int, max_documents: int = 4) -> Block:
    """Documents laid end to end from the start of one row, the rest padding; every token but the first trains."""
    token_ids = torch.zeros(row_length, dtype=torch.long)
    position_ids = torch.zeros(row_length, dtype=torch.long)
    document_ids = torch.full((row_length,), -1)
    loss_mask = torch.zeros(row_length, dtype=torch.bool)
    table = torch.zeros(max_documents, 4, dtype=torch.int32)
    start = 0
    for index, document in enumerate(documents):
        end = start + len(document)
        token_ids[start:end] = torch.tensor(document)
        position_ids[start:end] = torch.arange(len(document))
        document_ids[start:end] = index
        loss_mask[start + 1 : end] = True
        table[index, :2] = torch.tensor([start, end])
        start = end
    groups = torch.where(table[:, 1] > 0, torch.arange(max_documents), -1)
    return Block(
        token_ids, loss_mask, position_ids, document_ids, table, groups, {}, tuple(map(str, range(len(documents))))
    )


def random_documents(lengths: list[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Token ids, one list a document."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def plain_loss(causal_lm: Any, documents: list[list[int]]) -> Tensor:
    """Summed cross-entropy of a transformers model, one document at a time, from full logits."""
    total = torch.zeros(())
    for document in documents:
        ids = torch.tensor([document])
        logits = causal_lm(input_ids=ids, use_cache=False).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits[:-1].float(), ids[0, 1:], reduction="sum")
    return total


def packed_loss(model: PolicyModel, documents: list[list[int]], row_length: int) -> Tensor:
    """The same sum through `PolicyModel`, all documents in one row."""
    block = pack(documents, row_length)
    outputs = model(
        block, needs=frozenset({"weighted_nll"}), reads=block.loss_mask, coefficients=block.loss_mask.float()
    )
    return outputs.weighted_nll


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Name -> gradient of every parameter that has one; the model's are cleared."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """Largest error over all tensors, each relative to the largest entry of its expected value; and its name."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    return max((((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max()).item(), n) for n in theirs)
