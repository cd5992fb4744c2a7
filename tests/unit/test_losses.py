"""Losses on numbers that a person can check."""

from __future__ import annotations

import pytest
import torch

from burnish.losses.base import Loss
from burnish.losses.nll import NLL
from burnish.types import Block, TokenOutputs


def _block(**columns: torch.Tensor) -> Block:
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


def test_nll_weighs_every_trained_token_alike() -> None:
    assert NLL().coefficients(_block()).tolist() == [0, 1, 1, 0, 1, 0]
    assert NLL().count(_block()) == 3
    assert NLL().reads(_block()).tolist() == [False, True, True, False, True, False]


def test_nll_multiplies_a_documents_weight_and_leaves_the_count() -> None:
    block = _block(weight=torch.tensor([0.5, 4.0, 0.0]))
    assert NLL().coefficients(block).tolist() == [0, 0.5, 0.5, 0, 4, 0]  # padding reads no document's weight
    assert NLL().count(block) == 3


def test_nll_sums_and_reports_sum_and_count() -> None:
    total = torch.tensor(6.0, requires_grad=True)
    output = NLL()(TokenOutputs(weighted_nll=total), _block())
    assert output.total is total
    summed, count = output.metrics["loss"]
    assert (float(summed), float(count)) == (6.0, 3.0)
    assert isinstance(summed, torch.Tensor) and not summed.requires_grad


def test_a_loss_that_asks_for_weighted_nll_must_say_its_coefficients() -> None:
    with pytest.raises(AssertionError, match="Loss needs weighted_nll"):
        Loss(type="mine").coefficients(_block())
