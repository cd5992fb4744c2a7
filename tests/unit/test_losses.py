"""Losses on numbers that a person can check."""

from __future__ import annotations

import pytest
import torch

from burnish.losses.base import Loss
from burnish.losses.nll import NLL
from burnish.types import TokenOutputs
from tests.loss_helpers import two_documents


def test_nll_weighs_every_trained_token_alike() -> None:
    assert NLL().coefficients(two_documents()).tolist() == [0, 1, 1, 0, 1, 0]
    assert NLL().count(two_documents()) == 3
    assert NLL().reads(two_documents()).tolist() == [False, True, True, False, True, False]


def test_nll_multiplies_a_documents_weight_and_leaves_the_count() -> None:
    block = two_documents(weight=torch.tensor([0.5, 4.0, 0.0]))
    assert NLL().coefficients(block).tolist() == [0, 0.5, 0.5, 0, 4, 0]  # padding reads no document's weight
    assert NLL().count(block) == 3


def test_nll_sums_and_reports_sum_and_count() -> None:
    total = torch.tensor(6.0, requires_grad=True)
    output = NLL()(TokenOutputs(weighted_nll=total), two_documents())
    assert output.total is total
    summed, count = output.metrics["loss"]
    assert (float(summed), float(count)) == (6.0, 3.0)
    assert isinstance(summed, torch.Tensor) and not summed.requires_grad


def test_a_loss_that_asks_for_weighted_nll_must_say_its_coefficients() -> None:
    with pytest.raises(AssertionError, match="Loss needs weighted_nll"):
        Loss(type="mine").coefficients(two_documents())
