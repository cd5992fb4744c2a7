"""A prompt that all documents of a group begin with becomes a document of its own, so that it is computed once.

Two answers to a prompt of 100 tokens, 50 tokens each: 100 + 50 + 50 tokens in the row in place of 150 + 150.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from burnish.types import Sample

MIN_TOKENS = 16
"""Shorter beginnings stay with each document: a document more in the row costs about as much as it saves."""


def with_shared_prompt(samples: Sequence[Sample], boundary: int) -> tuple[Sample, ...]:
    """The shared prompt and what follows it in each document; the documents as they are where they share too little.

    Args:
        samples: documents of one group, whole.
        boundary: tokens of theirs that are masked because they straddle prompt and answer: they stay with the answers.

    The prompt ends before the first trained token of any document, and its columns are 0.
    """
    if len(samples) < 2:
        return tuple(samples)
    limit = min(int(sample.loss_mask.argmax()) if sample.loss_mask.any() else len(sample) - 1 for sample in samples)
    first = samples[0]
    for other in samples[1:]:
        same = first.token_ids[:limit] == other.token_ids[:limit]
        limit = limit if same.all() else int(same.argmin())
    limit -= bool(boundary)  # the token before the first trained one
    if limit < MIN_TOKENS:
        return tuple(samples)
    prompt = Sample(
        first.token_ids[:limit],
        np.zeros(limit, bool),
        first.sample_id,
        {name: np.zeros_like(column[:limit] if column.ndim else column) for name, column in first.columns.items()},
    )
    return prompt, *(_rest(sample, limit) for sample in samples)


def _rest(sample: Sample, start: int) -> Sample:
    columns = {name: column[start:] if column.ndim else column for name, column in sample.columns.items()}
    ids, trained = sample.token_ids[start:], sample.loss_mask[start:]
    return replace(sample, token_ids=ids, loss_mask=trained, columns=columns, prefix=0)
