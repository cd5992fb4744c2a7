"""The sampled softmax against the formula in float64, and against the full softmax."""

from __future__ import annotations

import math

import pytest
import torch

from burnish.data.packing.layout import empty_block, layout
from burnish.losses.sampled_softmax import SampledSoftmax
from burnish.model.project import project
from burnish.types import previous_token
from tests.events_helpers import history, rendered, vocabulary

ITEMS = [f"i{number}" for number in range(40)]
SIZE = 8


@pytest.fixture(scope="module")
def block(tmp_path_factory):
    tokenizer = vocabulary(tmp_path_factory.mktemp("items"), " ".join(ITEMS), features={"rating": ["1", "2"]})
    rows = [
        rendered(tokenizer, history(items, rating=["1"] * 5), feedback=["rating"]).group
        for items in ("i3 i0 i3 i1 i2", "i0 i39 i7 i7 i0")
    ]
    return layout(rows, 24, 4)


def weights(block, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(block.num_tokens, SIZE, generator=generator, dtype=dtype).requires_grad_()
    head = torch.randn(48, SIZE, generator=generator, dtype=dtype).requires_grad_()  # 43 tokens, 5 rows of padding
    return hidden, head


def total(loss, block, hidden, head):
    outputs = project(
        hidden,
        head,
        block.token_ids,
        loss.reads(block),
        loss.needs,
        previous_T=previous_token(block),
        candidates_K=loss.candidates(block),
        vocab_size=43,
    )
    return loss(outputs, block).total


def test_with_all_items_it_is_the_full_softmax_over_items(block):
    hidden, head = weights(block)
    sampled = total(SampledSoftmax(num_negatives=40), block, hidden, head)
    read = block.loss_mask.nonzero().squeeze(1)
    assert len(read) == 8
    # <pad>, rating=1 and rating=2 are ids 0 to 2: the items are 3 to 42
    logprobs = (hidden[previous_token(block)[read]] @ head[3:43].T).log_softmax(1)
    expected = -logprobs[torch.arange(8), block.token_ids[read] - 3].sum()
    assert torch.allclose(sampled, expected, rtol=1e-12)
    ours, theirs = (torch.autograd.grad(value, (hidden, head)) for value in (sampled, expected))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("negatives", ["uniform", "log_uniform"])
def test_a_sample_is_the_formula_in_float64(block, negatives):
    loss = SampledSoftmax(num_negatives=12, negatives=negatives)
    hidden, head = weights(block)
    candidates = loss.candidates(block).tolist()
    assert len(candidates) == 12 and all(3 <= candidate < 43 for candidate in candidates)
    expected = 0.0
    for t in block.loss_mask.nonzero().squeeze(1).tolist():
        own, state = block.token_ids[t].item(), hidden[previous_token(block)[t]].detach()
        z = (head.detach() @ state).tolist()
        partition = math.exp(z[own])
        for candidate in candidates:
            rank = candidate - 3
            chance = 1 / 40 if negatives == "uniform" else math.log((rank + 2) / (rank + 1)) / math.log(41)
            if candidate != own:
                partition += math.exp(z[candidate]) / (12 * chance)
        expected += math.log(partition) - z[own]
    assert total(loss, block, hidden, head).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("negatives", ["uniform", "log_uniform"])
def test_negatives_are_drawn_as_the_correction_believes(block, negatives):
    losses = [SampledSoftmax(num_negatives=39, negatives=negatives, seed=seed) for seed in range(1000)]
    counts = torch.bincount(torch.cat([loss.candidates(block) for loss in losses]) - 3, minlength=40)
    rank = torch.arange(40.0)
    chance = torch.full((40,), 1 / 40) if negatives == "uniform" else ((rank + 2) / (rank + 1)).log() / math.log(41)
    # 39,000 draws: every count within five standard deviations of what is expected
    expected = 39_000 * chance
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


def test_the_draw_depends_on_seed_and_tokens_alone(block):
    loss = SampledSoftmax(num_negatives=12)
    drawn = loss.candidates(block)
    torch.manual_seed(123)
    assert torch.equal(loss.candidates(block), drawn)
    assert not torch.equal(SampledSoftmax(num_negatives=12, seed=1).candidates(block), drawn)
    other = layout([rendered_other(block)], 24, 4)
    assert not torch.equal(loss.candidates(other), drawn)


def rendered_other(block):
    from burnish.types import Group, Sample

    ids = block.token_ids[:3].numpy()[::-1].copy()
    mask = block.loss_mask[:3].numpy()
    columns = {name: column[0].numpy() for name, column in block.columns.items()}
    return Group((Sample(ids, mask, "other", columns),))


def test_padding_costs_nothing(block):
    empty = empty_block(24, 4, block.columns)
    hidden, head = weights(empty)
    value = total(SampledSoftmax(num_negatives=12), empty, hidden, head)
    value.backward()
    assert value.item() == 0.0
    assert head.grad is not None and not head.grad.any()
