"""Corrections by hand, and in the documents of a loss."""

from __future__ import annotations

import math

import pytest
import torch

from burnish.corrections.base import Correction
from burnish.corrections.geometric_mask import GeometricMask
from burnish.corrections.sequence_mask import SequenceMask
from burnish.corrections.sequence_truncated import SequenceTruncated
from burnish.corrections.token_mask import TokenMask
from burnish.corrections.token_truncated import TokenTruncated
from burnish.losses.rl.reinforce import Reinforce
from burnish.types import TokenOutputs
from tests.loss_helpers import two_documents

LN2 = math.log(2)


@pytest.mark.parametrize(
    ("correction", "weights"),
    [
        (TokenTruncated(max_weight=1.5), [0.25, 1.0, 1.5, 1.5]),
        (TokenMask(min_ratio=0.5, max_ratio=3.0), [0.0, 1.0, 2.0, 0.0]),
        (SequenceTruncated(max_weight=3.0), [0.25, 1.0, 2.0, 3.0]),
        (SequenceMask(min_ratio=0.5, max_ratio=1.5), [0.0, 1.0, 0.0, 0.0]),
        (SequenceMask(), [0.25, 1.0, 2.0, 0.0]),
        (GeometricMask(min_ratio=0.2, max_ratio=1.5), [1.0, 1.0, 0.0, 0.0]),
    ],
    ids=str,
)
def test_weights_of_ratios_of_a_quarter_one_two_and_four(correction: Correction, weights: list[float]) -> None:
    log_ratio = torch.tensor([-2 * LN2, 0.0, LN2, 2 * LN2], dtype=torch.float64)
    found = correction(log_ratio)
    assert found.weights.tolist() == pytest.approx(weights)
    as_they_are = [1.0] * 4 if correction.type == "geometric_mask" else log_ratio.exp().tolist()
    assert found.changed.tolist() == [abs(a - b) > 1e-9 for a, b in zip(weights, as_they_are, strict=True)]


@pytest.mark.parametrize(
    ("correction", "total", "share", "weight"),
    [
        # Tokens' ratios are 4 and 2, then 1/2; the rollouts' 8 and 1/2, by geometric mean 2.83 and 1/2.
        (TokenTruncated(max_weight=3.0), 3 + 2 + 0.5, (1, 3), 5.5),
        (TokenMask(min_ratio=0.6, max_ratio=3.0), 0 + 2 + 0, (2, 3), 2.0),
        (SequenceTruncated(max_weight=5.0), 5 + 5 + 0.5, (1, 2), 5.5),
        (SequenceMask(max_ratio=3.0), 0 + 0 + 0.5, (1, 2), 0.5),
        (GeometricMask(min_ratio=0.6, max_ratio=3.0), 1 + 1 + 0, (1, 2), 1.0),
        (GeometricMask(min_ratio=0.4, max_ratio=2.8), 0 + 0 + 1, (1, 2), 1.0),
    ],
    ids=str,
)
def test_tokens_and_rollouts_are_weighed(
    correction: Correction, total: float, share: tuple[int, int], weight: float
) -> None:
    """The loss is -1 * -1 at each token, and its count is of what was sampled, masked or not."""
    block = two_documents(
        advantages=torch.tensor([9.0, 1.0, 1.0, 9.0, 1.0, 9.0]),
        rollout_logprobs=torch.tensor([0.0, -2 * LN2, -LN2, 0.0, LN2, 0.0]) - 3,
        old_logprobs=torch.full((6,), -3.0),
    )
    loss = Reinforce(correction=correction)
    output = loss(TokenOutputs(logprobs=torch.full((6,), -1.0), entropy=torch.zeros(6)), block)
    assert output.total.item() == pytest.approx(total)
    assert loss.count(block) == 3
    metrics = {name: (float(summed), float(count)) for name, (summed, count) in output.metrics.items()}
    assert metrics["correction_share"] == share
    assert metrics["correction_weight"] == (pytest.approx(weight), share[1])


def test_the_old_policy_is_the_present_one_before_its_first_update() -> None:
    """Without a column of old log-probabilities the weight is pi / mu, and has no gradient."""
    block = two_documents(advantages=torch.ones(6), rollout_logprobs=torch.full((6,), -1.0 - LN2))
    logprobs = torch.full((6,), -1.0, requires_grad=True)
    output = Reinforce(correction=TokenTruncated(max_weight=3.0))(
        TokenOutputs(logprobs=logprobs, entropy=torch.zeros(6)), block
    )
    output.total.backward()
    assert output.total.item() == pytest.approx(6.0)  # 2 * 1 at three tokens
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx([0, -2, -2, 0, -2, 0])


def test_differences_beyond_float32_stay_finite() -> None:
    block = two_documents(
        advantages=torch.ones(6), rollout_logprobs=torch.full((6,), -200.0), old_logprobs=torch.zeros(6)
    )
    for correction in (TokenTruncated(), TokenMask(), SequenceTruncated(), SequenceMask(), GeometricMask()):
        output = Reinforce(correction=correction)(TokenOutputs(logprobs=torch.zeros(6), entropy=torch.zeros(6)), block)
        assert all(math.isfinite(float(summed)) for summed, _ in output.metrics.values())
