"""Pairs laid into blocks by hand: answers with given log-probabilities, or with given tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from burnish.data.packing.layout import layout
from burnish.types import Block, Group, Sample, TokenOutputs


@dataclass(frozen=True)
class Answer:
    """Log-probabilities of an answer's trained tokens under policy and reference."""

    logprobs: list[float]
    ref_logprobs: list[float]
    preference: int
    weight: float = 1.0


Pair = tuple[Answer, Answer]
"""(chosen, rejected)"""

PROMPT_LOGPROBS = np.array([-9.0, -8.0], np.float32)
"""What a sum of losses may have the model say of tokens that a preference loss does not train: it must not matter."""


def answer_block(
    groups: Sequence[Sequence[Answer]], *, shared: bool, row_length: int = 64, num_documents: int = 16
) -> tuple[Block, Tensor]:
    """(block, logprobs float32 [T]) of groups of answers, each behind two prompt tokens of its own, or `shared`."""
    packed = layout([_group(group, shared) for group in groups], row_length, num_documents)
    columns = dict(packed.columns)
    logprobs = columns.pop("logprobs")
    return replace(packed, columns=columns), logprobs


def outputs_of(logprobs: Tensor) -> TokenOutputs:
    return TokenOutputs(logprobs=logprobs)


def _group(answers: Sequence[Answer], shared: bool) -> Group:
    if not shared:
        return Group(tuple(_sample(answer, PROMPT_LOGPROBS, None) for answer in answers))
    prompt = _sample(Answer([], [], 0, answers[0].weight), PROMPT_LOGPROBS, None)
    return Group((prompt, *(_sample(answer, PROMPT_LOGPROBS[:0], 0) for answer in answers)))


def _sample(answer: Answer, before: np.ndarray, prefix: int | None) -> Sample:
    length = len(before) + len(answer.logprobs)
    return Sample(
        token_ids=np.arange(length, dtype=np.int32),
        loss_mask=np.arange(length) >= len(before),
        sample_id="by hand",
        columns={
            "preference": np.array(answer.preference, np.float32),
            "weight": np.array(answer.weight, np.float32),
            "margin": np.array(0.0, np.float32),
            "logprobs": np.concatenate([before, answer.logprobs]).astype(np.float32),
            "ref_logprobs": np.concatenate([before, answer.ref_logprobs]).astype(np.float32),
        },
        prefix=prefix,
    )


@dataclass(frozen=True)
class TokenPair:
    """A pair as token ids; both answers go on after the prompt."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def token_pairs(lengths: Sequence[tuple[int, int, int]], vocab_size: int, seed: int = 0) -> list[TokenPair]:
    """Random pairs with prompts, chosen and rejected answers of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        TokenPair(*(torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in pair))
        for pair in lengths
    ]


def token_block(
    pairs: Sequence[TokenPair], row_length: int, *, shared: bool, chosen_first: bool = True, num_documents: int = 12
) -> Block:
    """A row of pairs with the columns of preference data; the prompt once for both answers, or before each."""
    groups = []
    for pair in pairs:
        answers = [(pair.chosen, 1), (pair.rejected, -1)]
        before, prefix = ([], 0) if shared else (pair.prompt, None)
        samples = [_tokens(before, answer, side, prefix) for answer, side in answers[:: 1 if chosen_first else -1]]
        groups.append(Group((_tokens(pair.prompt, [], 0, None), *samples) if shared else tuple(samples)))
    return layout(groups, row_length, num_documents)


def _tokens(before: list[int], answer: list[int], preference: int, prefix: int | None) -> Sample:
    ids = np.array([*before, *answer], np.int32)
    return Sample(
        token_ids=ids,
        loss_mask=np.arange(len(ids)) >= len(before),
        sample_id="by hand",
        columns={"preference": np.array(preference, np.float32), "weight": np.array(1.0, np.float32)},
        prefix=prefix,
    )
