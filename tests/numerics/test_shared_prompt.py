"""A prompt that two answers share is computed once, and nothing else changes: log-probabilities and every gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from burnish.data.packing.layout import layout
from burnish.data.rendering.share import MIN_TOKENS, with_shared_prompt
from burnish.model.policy_model import PolicyModel
from burnish.types import Block, Group, Sample, collate
from tests.policy_model_helpers import gradients, largest_difference
from tests.tiny_models import VOCAB_SIZE, tiny_model

PAIRS = [(20, 3, 7), (33, 5, 1), (17, 2, 2)]
"""Tokens of prompt, chosen and rejected; the sliding window of the Gemma is 4, shorter than prompts and answers."""


def pair(index: int, lengths: tuple[int, int, int], *, reverse: bool = False) -> list[Sample]:
    generator = np.random.default_rng(index)
    prompt, *answers = (generator.integers(3, VOCAB_SIZE, n).astype(np.int32) for n in lengths)
    samples = []
    for answer, sign in zip(answers, (1, -1), strict=True):
        ids = np.concatenate([prompt, answer])
        columns = {"preference": np.array(sign, np.float32), "sign": np.full(len(ids), sign, np.float32)}
        samples.append(Sample(ids, np.arange(len(ids)) >= len(prompt), f"pairs:{index}", columns))
    return samples[::-1] if reverse else samples


def groups(*, share: bool) -> list[Group]:
    pairs = [pair(i, lengths, reverse=i == 1) for i, lengths in enumerate(PAIRS)]
    return [Group(with_shared_prompt(samples, 0) if share else tuple(samples)) for samples in pairs]


def margins(model: PolicyModel, block: Block) -> tuple[Tensor, Tensor]:
    """(sum over pairs of -log sigmoid(log p(chosen) - log p(rejected)), the log-probabilities of the answers)."""
    logprobs = model(block, needs=frozenset({"logprobs"}), reads=block.loss_mask).logprobs
    assert torch.equal(block.columns["sign"][block.loss_mask].abs(), torch.ones(int(block.loss_mask.sum())))
    signed = torch.where(block.loss_mask, logprobs * block.columns["sign"], 0.0)
    group = block.group_ids[block.document_ids.clamp(min=0)].clamp(min=0)
    margin = signed.new_zeros(int(block.group_ids.max()) + 1).index_add(0, group, signed)
    return -torch.nn.functional.logsigmoid(0.1 * margin).sum(), logprobs[block.loss_mask].detach()


def measured(model: PolicyModel, blocks: list[Block]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    results = [margins(model, block) for block in blocks]
    total = torch.stack([loss for loss, _ in results]).sum()
    total.backward()
    return total.detach(), torch.cat([logprobs for _, logprobs in results]), gradients(model)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request) -> PolicyModel:
    return PolicyModel.from_hf(tiny_model(request.param).double())


@pytest.fixture(scope="module")
def whole(model):
    """Every pair in a row of its own, each answer behind its own copy of the prompt."""
    blocks = [layout([group], len(group), 4) for group in groups(share=False)]
    assert all(not block.documents[:, 2:].any() for block in blocks)
    return measured(model, blocks)


SHARED = {
    "one by one": lambda: [layout([group], len(group), 4) for group in groups(share=True)],
    "packed": lambda: [layout(groups(share=True), 120, 12)],
    "collated": lambda: [collate([layout([group], 50, 4) for group in groups(share=True)])],
    "collated rows of several": lambda: [
        collate([layout(groups(share=True)[:2], 80, 8), layout(groups(share=True)[2:], 80, 8)])
    ],
}


@pytest.mark.parametrize("arrangement", SHARED)
def test_sharing_changes_neither_log_probabilities_nor_gradients(model, whole, arrangement: str) -> None:
    blocks = SHARED[arrangement]()
    # 20 + 3 + 7, 33 + 5 + 1, 17 + 2 + 2 tokens; unshared 20 + 33 + 17 more.
    assert sum(int((block.document_ids >= 0).sum()) for block in blocks) == 90
    assert sum(int((block.documents[:, 3] > 0).sum()) for block in blocks) == 6
    loss, logprobs, found = measured(model, blocks)
    expected_loss, expected_logprobs, expected = whole
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=1e-6, atol=1e-6)
    worst, name = largest_difference(found, expected)
    assert worst < 1e-6, name


def test_half_of_the_pairs_shared_in_one_row(model, whole) -> None:
    mixed = [groups(share=True)[0], groups(share=False)[1], groups(share=True)[2]]
    _, logprobs, found = measured(model, [layout(mixed, 128, 12)])
    torch.testing.assert_close(logprobs, whole[1], rtol=1e-6, atol=1e-6)
    assert largest_difference(found, whole[2])[0] < 1e-6


def test_a_prompt_that_is_seen_wrongly_is_noticed(model, whole) -> None:
    """The tolerance above means something: positions that do not go on behind the prompt move the result."""
    block = layout(groups(share=True), 120, 12)
    starts = block.documents[block.document_ids.clamp(min=0), 0]
    block.position_ids = torch.where(block.document_ids >= 0, torch.arange(120) - starts, 0)
    _, logprobs, _ = measured(model, [block])
    assert (logprobs - whole[1]).abs().max() > 1e-3


def test_what_is_shared() -> None:
    prompt, chosen, rejected = with_shared_prompt(pair(0, (20, 3, 7)), 0)
    assert (len(prompt), len(chosen), len(rejected)) == (20, 3, 7)
    assert (prompt.prefix, chosen.prefix, rejected.prefix) == (None, 0, 0)
    assert not prompt.loss_mask.any() and chosen.loss_mask.all() and rejected.loss_mask.all()
    assert prompt.columns["preference"] == 0 and not prompt.columns["sign"].any()
    assert chosen.columns["preference"] == 1 and chosen.columns["sign"].tolist() == [1, 1, 1]
    assert prompt.token_ids.tolist() == pair(0, (20, 3, 7))[1].token_ids[:20].tolist()


def test_a_short_prompt_and_answers_that_begin_alike() -> None:
    assert all(s.prefix is None for s in with_shared_prompt(pair(0, (MIN_TOKENS - 1, 3, 7)), 0))
    assert len(with_shared_prompt(pair(0, (MIN_TOKENS, 3, 7)), 0)) == 3
    # Equal trained tokens are not shared: both answers learn them. A token that straddles stays with its answer.
    a, b = pair(0, (20, 6, 8))
    b.token_ids[20:23] = a.token_ids[20:23]
    assert [len(s) for s in with_shared_prompt([a, b], 0)] == [20, 6, 8]
    assert [len(s) for s in with_shared_prompt([a, b], 1)] == [19, 7, 9]
    # Prompts that part early: only what is common is shared.
    b.token_ids[18] += 1
    assert [len(s) for s in with_shared_prompt([a, b], 0)] == [18, 8, 10]
    assert [len(s) for s in with_shared_prompt([a], 0)] == [26]
