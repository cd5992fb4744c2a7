"""Groups side by side in a row: from numpy samples to a torch `Block`. It decides nothing, `Packer` did."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from burnish.types import Block

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from burnish.types import Group, Sample


def layout(groups: Sequence[Group], row_length: int, num_documents: int) -> Block:
    """One packed row: the samples of `groups` in order, then padding. See `Block` for an example.

    All samples of a run have the same columns; scalar ones become [D], the others [T].
    """
    samples = [sample for group in groups for sample in group.samples]
    lengths = np.array([len(sample) for sample in samples])
    ends = np.cumsum(lengths)
    starts = ends - lengths
    prefixes = _prefixes(groups)
    used, tokens = len(samples), int(ends[-1])
    assert used <= num_documents and tokens <= row_length, (used, num_documents, tokens, row_length)

    documents = np.zeros((num_documents, 4), np.int32)
    documents[:used, 0], documents[:used, 1] = starts, ends
    shared = prefixes >= 0
    before = np.where(shared, lengths[prefixes], 0)
    documents[:used][shared, 2:] = documents[prefixes[shared], :2]
    group_ids = np.full(num_documents, -1, np.int64)
    group_ids[:used] = np.repeat(np.arange(len(groups)), [len(group.samples) for group in groups])
    document_ids = np.full(row_length, -1, np.int64)
    document_ids[:tokens] = np.repeat(np.arange(used), lengths)
    position_ids = np.zeros(row_length, np.int64)
    position_ids[:tokens] = np.arange(tokens) - np.repeat(starts - before, lengths)
    return Block(
        token_ids=_joined([sample.token_ids for sample in samples], row_length, np.dtype(np.int64)),
        loss_mask=_joined([sample.loss_mask for sample in samples], row_length, np.dtype(np.bool_)),
        position_ids=torch.from_numpy(position_ids),
        document_ids=torch.from_numpy(document_ids),
        documents=torch.from_numpy(documents),
        group_ids=torch.from_numpy(group_ids),
        columns=_columns(samples, row_length, num_documents),
        sample_ids=tuple(sample.sample_id for sample in samples),
    )


def _prefixes(groups: Sequence[Group]) -> np.ndarray:
    """int64 [samples]: the index in the row of the sample that stands before each, -1 where none does."""
    prefixes, first = [], 0
    for group in groups:
        prefixes += [-1 if sample.prefix is None else first + sample.prefix for sample in group.samples]
        first += len(group.samples)
    return np.array(prefixes)


def sizes(groups: Iterable[Group]) -> list[tuple[int, int]]:
    """(tokens, documents) of each group: all that packing looks at."""
    return [(len(group), len(group.samples)) for group in groups]


def empty_block(row_length: int, num_documents: int, columns: Mapping[str, torch.Tensor]) -> Block:
    """A row of padding, with zeros in the columns of another row: what fills up the last step of a finite run."""
    return Block(
        token_ids=torch.zeros(row_length, dtype=torch.int64),
        loss_mask=torch.zeros(row_length, dtype=torch.bool),
        position_ids=torch.zeros(row_length, dtype=torch.int64),
        document_ids=torch.full((row_length,), -1, dtype=torch.int64),
        documents=torch.zeros((num_documents, 4), dtype=torch.int32),
        group_ids=torch.full((num_documents,), -1, dtype=torch.int64),
        columns={name: torch.zeros_like(column) for name, column in columns.items()},
    )


def _columns(samples: list[Sample], row_length: int, num_documents: int) -> dict[str, torch.Tensor]:
    names = samples[0].columns.keys()
    assert all(sample.columns.keys() == names for sample in samples), "samples of one run differ in their columns"
    columns = {}
    for name in names:
        values = [sample.columns[name] for sample in samples]
        if values[0].ndim == 0:
            columns[name] = _joined([np.stack(values)], num_documents, values[0].dtype)
        else:
            columns[name] = _joined(values, row_length, values[0].dtype)
    return columns


def _joined(parts: list[np.ndarray], size: int, dtype: np.dtype) -> torch.Tensor:
    joined = np.zeros(size, dtype)
    np.concatenate(parts, out=joined[: sum(map(len, parts))], casting="same_kind")
    return torch.from_numpy(joined)
