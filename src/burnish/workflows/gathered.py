"""A step's rows and their vectors from all ranks, for losses that couple all documents of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from burnish.types import Block

if TYPE_CHECKING:
    from burnish.mesh import Mesh

FIELDS = ("token_ids", "loss_mask", "position_ids", "document_ids", "documents", "group_ids")


def of_all_ranks(blocks: list[Block], vectors: list[Tensor], mesh: Mesh) -> tuple[list[Block], list[Tensor], list[int]]:
    """(blocks, their vectors without a graph, places of this rank's own among them), in the order of the run: the first
    of every rank, then the second of every rank... Every rank brings as many, all of one shape.
    """
    shares = mesh.sizes.data
    names = mesh.gather([list(block.sample_ids) for block in blocks])[:: mesh.peers]
    columns = sorted(blocks[0].columns)
    fields = {name: mesh.gather_tensor(torch.stack([getattr(block, name) for block in blocks])) for name in FIELDS}
    extra = {name: mesh.gather_tensor(torch.stack([block.columns[name] for block in blocks])) for name in columns}
    all_vectors = mesh.gather_tensor(torch.stack(vectors))
    order = [(index, rank) for index in range(len(blocks)) for rank in range(shares)]
    gathered = [
        Block(
            **{name: fields[name][rank][index] for name in FIELDS},
            columns={name: extra[name][rank][index] for name in columns},
            sample_ids=tuple(names[rank][index]),
        )
        for index, rank in order
    ]
    own = [place for place, (_, rank) in enumerate(order) if rank == mesh.data_rank]
    return gathered, [all_vectors[rank][index] for index, rank in order], own
