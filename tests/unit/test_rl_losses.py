"""Losses on sampled tokens by hand: values, gradients, denominators and metrics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from burnish.component import OneOf
from burnish.data.packing.layout import empty_block
from burnish.losses.rl.base import PolicyLoss
from burnish.losses.rl.cispo import CISPO
from burnish.losses.rl.gspo import GSPO
from burnish.losses.rl.kl import kl_estimate
from burnish.losses.rl.ppo import PPO, explained_variance, value_reads
from burnish.losses.rl.ppo_clip import PPOClip
from burnish.losses.rl.reinforce import Reinforce
from burnish.types import Block, LossOutput, TokenOutputs, collate
from tests.loss_helpers import two_documents

OUTSIDE = 7.0
"""Stands wherever a loss must not look: prompts, padding."""
RATIOS, ADVANTAGES, LOGPROBS = [1.5, 0.5, 1.1], [2.0, 2.0, -1.0], [-1.0, -2.0, -3.0]
"""Of the sampled tokens, two of the first rollout and one of the second."""


def at_sampled(values: list[float], outside: float = OUTSIDE) -> Tensor:
    """[T] of `two_documents`."""
    found = torch.full((6,), outside)
    found[[1, 2, 4]] = torch.tensor(values)
    return found


def block_of(ratios: list[float] = RATIOS, advantages: list[float] = ADVANTAGES, **columns: list[float]) -> Block:
    """The ratio is against the rollout's log-probabilities, which an engine said."""
    rollout = [logprob - math.log(ratio) for logprob, ratio in zip(LOGPROBS, ratios, strict=True)]
    own = {"advantages": advantages, "rollout_logprobs": rollout} | columns
    return two_documents(**{name: at_sampled(values) for name, values in own.items()})


def called(loss: PolicyLoss, block: Block, **outputs: Any) -> tuple[LossOutput, list[float]]:
    """(output, gradient by the log-probabilities of the sampled tokens)"""
    logprobs = at_sampled(LOGPROBS).requires_grad_()
    output = loss(TokenOutputs(logprobs=logprobs, entropy=at_sampled([0.5, 1.0, 1.5]), **outputs), block)
    output.total.backward()
    assert logprobs.grad is not None and not logprobs.grad[[0, 3, 5]].any()
    return output, logprobs.grad[[1, 2, 4]].tolist()


def metric(output: LossOutput, name: str) -> tuple[Any, float]:
    total, count = output.metrics[name]
    return pytest.approx(float(total), rel=1e-5, abs=1e-6), float(count)


ON_ROLLOUT: dict[str, Any] = {"old_logprobs": "rollout"}
S = math.sqrt(1.5 * 0.5)  # the first rollout's ratio, 0.866


@pytest.mark.parametrize(
    ("loss", "total", "gradient"),
    [
        # -min(2 * 1.5, 2 * 1.2) = -2.4, -min(2 * 0.5, 2 * 0.8) = -1, -min(-1.1, -1.1) = 1.1; the first is clipped
        (PPOClip(**ON_ROLLOUT), -2.3, [0.0, -1.0, 1.1]),
        (PPOClip(**ON_ROLLOUT, clip_high=0.6), -2.9, [-3.0, -1.0, 1.1]),
        (PPOClip(**ON_ROLLOUT, aggregation="sequence"), -1.7 + 1.1, [0.0, -0.5, 1.1]),
        (PPOClip(**ON_ROLLOUT, aggregation="constant", constant_length=4), -2.3 / 4, [0.0, -0.25, 0.275]),
        (PPOClip(**ON_ROLLOUT, dual_clip=1.05), -3.4 + 1.05, [0.0, -1.0, 0.0]),
        (PPOClip(), -3.0, [-2.0, -2.0, 1.0]),  # before the first update the ratio is 1 and the gradient -A
        # -2 s for both tokens of the first rollout, half of it a token; s is inside the bounds
        (GSPO(**ON_ROLLOUT, clip_low=0.2, clip_high=0.2), -2 * S + 1.1, [-S, -S, 1.1]),
        (GSPO(**ON_ROLLOUT, clip_low=0.2, clip_high=0.05), -2 * S + 1.1, [-S, -S, 1.1]),
        (CISPO(**ON_ROLLOUT, min_ratio=0.8, max_ratio=1.2), 2.4 + 3.2 - 3.3, [-2.4, -1.6, 1.1]),
        (CISPO(**ON_ROLLOUT), 3.0 + 2.0 - 3.3, [-3.0, -1.0, 1.1]),
        (Reinforce(**ON_ROLLOUT), 2.0 + 4.0 - 3.0, [-2.0, -2.0, 1.0]),
        (Reinforce(**ON_ROLLOUT, importance_weights=True), 3.0 + 2.0 - 3.3, [-3.0, -1.0, 1.1]),
    ],
    ids=str,
)
def test_by_hand(loss: PolicyLoss, total: float, gradient: list[float]) -> None:
    output, found = called(loss, block_of())
    assert output.total.item() == pytest.approx(total, rel=1e-6)
    assert found == pytest.approx(gradient, rel=1e-6)
    assert loss.count(block_of()) == (3 if loss.aggregation == "token" else 2)
    assert (
        metric(output, "loss")
        == metric(output, "policy_loss")
        == (pytest.approx(total, rel=1e-6), loss.count(block_of()))
    )


def test_a_rollout_s_ratio_is_clipped_as_one() -> None:
    """Ratios of 4 and 1 are 2 for the rollout: above 1.2, so neither token has a gradient, though one has not moved."""
    output, gradient = called(GSPO(**ON_ROLLOUT, clip_low=0.2, clip_high=0.2), block_of([4.0, 1.0, 1.1]))
    assert output.total.item() == pytest.approx(-2 * 1.2 + 1.1)
    assert gradient == pytest.approx([0.0, 0.0, 1.1])
    assert metric(output, "clip_fraction_high") == (2, 3)
    assert metric(output, "ratio") == (5.1, 3)


def test_the_second_bound_of_negative_advantages() -> None:
    """A ratio of 4 with advantage -1 is 4 without it, and 3 with it and no gradient; a positive one is not touched."""
    block = block_of([4.0, 4.0, 1.0], [-1.0, 1.0, -1.0])
    assert called(PPOClip(**ON_ROLLOUT), block)[1] == pytest.approx([4.0, 0.0, 1.0])
    output, gradient = called(PPOClip(**ON_ROLLOUT, dual_clip=3.0), block)
    assert output.total.item() == pytest.approx(3 - 1.2 + 1)
    assert gradient == pytest.approx([0.0, 0.0, 1.0])
    assert metric(output, "clip_fraction_dual") == (1, 3)


def test_old_logprobs_that_an_earlier_pass_wrote() -> None:
    old = [logprob - math.log(ratio) for logprob, ratio in zip(LOGPROBS, [1.1, 0.5, 1.0], strict=True)]
    block = block_of(old_logprobs=old)
    assert called(PPOClip(), block)[1] == pytest.approx([-2.2, -1.0, 1.0])
    assert called(PPOClip(**ON_ROLLOUT), block)[1] == pytest.approx([0.0, -1.0, 1.1])  # which the rollout's do not need


@pytest.mark.parametrize(
    ("fields", "values", "gradients"),
    [
        # r = log p - log q = ln 2, -ln 2 and 0
        ({"kl_estimator": "k2"}, [0.240227, 0.240227, 0.0], [0.693147, -0.693147, 0.0]),  # r^2 / 2, r
        ({"kl_estimator": "k3"}, [0.193147, 0.306853, 0.0], [0.5, -1.0, 0.0]),  # e^-r - 1 + r, 1 - e^-r
        (
            {"kl_estimator": "k1", "kl_unbiased": True},
            [0.693147, -0.693147, 0.0],
            [1.693147, 0.306853, 1.0],
        ),  # r, 1 + r
        ({"kl_unbiased": True}, [0.193147, 0.306853, 0.0], [0.693147, -0.693147, 0.0]),  # k3, k3 + 1 - e^-r = r
    ],
    ids=str,
)
def test_kl_in_the_loss(fields: dict[str, Any], values: list[float], gradients: list[float]) -> None:
    """With a coefficient of 0.5 and no advantage, by token and by rollout."""
    ref = [LOGPROBS[0] - math.log(2), LOGPROBS[1] + math.log(2), LOGPROBS[2]]
    block = block_of([1.0] * 3, [0.0] * 3, ref_logprobs=ref)
    for aggregation, shares in (("token", [1.0, 1.0, 1.0]), ("sequence", [0.5, 0.5, 1.0])):
        loss = PPOClip.model_validate({**fields, "kl_coef": 0.5, "aggregation": aggregation})
        assert loss.asks == {"ref_logprobs"}
        output, found = called(loss, block)
        halved = [0.5 * share for share in shares]
        assert output.total.item() == pytest.approx(sum(s * v for s, v in zip(halved, values, strict=True)), abs=1e-6)
        assert found == pytest.approx([s * g for s, g in zip(halved, gradients, strict=True)], abs=1e-6)
        assert metric(output, "ref_kl") == (sum(values), 3)
    assert PPOClip().asks == frozenset()


@pytest.mark.parametrize(("estimator", "expected"), [("k1", [20.0, -20.0]), ("k2", [200.0, 200.0])])
def test_kl_of_what_a_reference_never_says(estimator: Any, expected: list[float]) -> None:
    log_ratio = torch.tensor([math.inf, -math.inf])
    assert kl_estimate(log_ratio, estimator).tolist() == expected
    assert kl_estimate(log_ratio, "k3").isfinite().all()


def test_an_entropy_bonus() -> None:
    """-0.1 * (0.5 + 1 + 1.5) by token, -0.1 * (0.75 + 1.5) by rollout, and its gradient."""
    for aggregation, total, shares in (("token", -0.3, [1.0, 1.0, 1.0]), ("sequence", -0.225, [0.5, 0.5, 1.0])):
        entropy = at_sampled([0.5, 1.0, 1.5]).requires_grad_()
        loss = PPOClip.model_validate({"entropy_coef": 0.1, "aggregation": aggregation})
        output = loss(TokenOutputs(logprobs=at_sampled(LOGPROBS), entropy=entropy), block_of(advantages=[0.0] * 3))
        output.total.backward()
        assert output.total.item() == pytest.approx(total)
        assert entropy.grad is not None
        assert entropy.grad.tolist() == pytest.approx(at_sampled([-0.1 * s for s in shares], 0.0).tolist())
        assert metric(output, "entropy") == (3.0, 3)


def test_metrics_of_sampled_tokens() -> None:
    output, _ = called(PPOClip(**ON_ROLLOUT), block_of([1.5, 0.5, 0.7]))
    found = {name: metric(output, name) for name in output.metrics}
    del found["loss"], found["policy_loss"]
    logs = [math.log(1.5), math.log(0.5), math.log(0.7)]
    assert found == {
        "entropy": (3.0, 3),
        "advantage_abs": (5.0, 3),
        "ratio": (2.7, 3),
        "clip_fraction_low": (1, 3),  # 0.7, of advantage -1; 0.5 has advantage 2
        "clip_fraction_high": (1, 3),
        "approx_kl": (2.7 - 3 - sum(logs), 3),
        "mismatch_kl": (-sum(logs), 3),  # log mu - log pi
        "mismatch_k3": (2.7 - 3 - sum(logs), 3),
        "mismatch_abs": (sum(map(abs, logs)), 3),
    }


def test_mismatch_is_of_the_policy_that_the_ratio_is_against() -> None:
    """It was measured before the first update, so what the policy has learned since is not in it."""
    block = block_of(old_logprobs=[-1.0, -2.5, -3.0])
    rollout = block.columns["rollout_logprobs"][[1, 2, 4]].tolist()
    output, _ = called(PPOClip(), block)
    expected = sum(mu - old for mu, old in zip(rollout, [-1.0, -2.5, -3.0], strict=True))
    assert metric(output, "mismatch_kl") == (expected, 3)
    assert metric(output, "approx_kl") == (math.exp(0.5) - 1 - 0.5, 3)


def test_ratios_that_would_overflow() -> None:
    """e^20 at most, and no gradient beyond."""
    for loss in (PPOClip(**ON_ROLLOUT), GSPO(**ON_ROLLOUT), CISPO(**ON_ROLLOUT), Reinforce(importance_weights=True)):
        block = two_documents(
            advantages=at_sampled([-1.0, 1.0, -1.0]), rollout_logprobs=at_sampled([-300.0, 300.0, -300.0])
        )
        output, gradient = called(loss, block)
        assert math.isfinite(output.total.item()) and all(map(math.isfinite, gradient))
        assert all(math.isfinite(float(total)) for total, _ in output.metrics.values())
    block = two_documents(advantages=at_sampled([-1.0] * 3), rollout_logprobs=at_sampled([-300.0] * 3))
    output, gradient = called(PPOClip(**ON_ROLLOUT), block)
    assert output.total.item() == pytest.approx(3 * math.exp(20))
    assert gradient == [0.0, 0.0, 0.0]


# The value head.


def values_block(**columns: list[float]) -> Block:
    """A shared prompt of 2 tokens, then completions of 2 and 3 tokens of which the second's middle one was observed."""
    sampled = torch.tensor([False, False, True, True, True, False, True])
    columns = {"advantages": [0.0] * 4, "rollout_logprobs": [-1.0] * 4} | columns
    given = {}
    for name, values in columns.items():
        given[name] = torch.full((7,), OUTSIDE)
        given[name][sampled] = torch.tensor(values)
    return Block(
        token_ids=torch.arange(7),
        loss_mask=sampled,
        position_ids=torch.tensor([0, 1, 2, 3, 2, 3, 4]),
        document_ids=torch.tensor([0, 0, 1, 1, 2, 2, 2]),
        documents=torch.tensor([[0, 2, 0, 0], [2, 4, 0, 2], [4, 7, 0, 2]], dtype=torch.int32),
        group_ids=torch.tensor([0, 0, 0]),
        columns=given,
        sample_ids=("a", "a", "a"),
    )


def called_ppo(loss: PPO, block: Block) -> tuple[LossOutput, list[float]]:
    """(output, gradient by the scores); the score at token t is t / 10."""
    scores = (torch.arange(7.0) / 10).unsqueeze(1).requires_grad_()
    logprobs = torch.full((7,), -1.0)
    output = loss(TokenOutputs(logprobs=logprobs, entropy=torch.zeros(7), scores={"value": scores}), block)
    output.total.backward()
    assert scores.grad is not None
    return output, scores.grad.squeeze(1).tolist()


def test_the_value_of_a_token_is_said_before_it() -> None:
    """Both completions begin behind the prompt's last token, 1; the last one's last token behind what was observed."""
    block = values_block()
    assert value_reads(block).tolist() == [False, True, True, False, False, True, False]
    assert PPO().reads(block).tolist() == [False, True, True, True, True, True, True]
    outputs = TokenOutputs(scores={"value": (torch.arange(7.0) / 10).unsqueeze(1)})
    assert PPO().values(outputs, block).tolist() == pytest.approx([0, 0, 0.1, 0.2, 0.1, 0, 0.5])
    assert PPO().heads() == {"value": "number"} and PPO(head="critic").heads() == {"critic": "number"}


def test_the_value_head_learns_returns() -> None:
    """Values .1, .2, .1, .5 and returns 1, 0, .1, 1: errors -.9, .2, 0, -.5."""
    block = values_block(returns=[1.0, 0.0, 0.1, 1.0])
    output, gradient = called_ppo(PPO(value_coef=0.5, value_clip=None), block)
    assert output.total.item() == pytest.approx(0.25 * (0.81 + 0.04 + 0.25))
    assert gradient == pytest.approx([0, 0.5 * -0.9, 0.5 * 0.2, 0, 0, 0.5 * -0.5, 0])
    assert metric(output, "value_loss") == (0.55, 4)
    by_rollout, _ = called_ppo(PPO(value_coef=0.5, value_clip=None, aggregation="sequence"), block)
    assert by_rollout.total.item() == pytest.approx(0.25 * ((0.81 + 0.04) / 2 + 0.25 / 2))


def test_a_value_that_has_moved_gains_nothing_more() -> None:
    """Old values 0, 0, .1, .9 with a clip of .05: .05, .05, .1 and .85 count where their error is the larger one."""
    block = values_block(returns=[1.0, 0.0, 0.1, 1.0], old_values=[0.0, 0.0, 0.1, 0.9])
    output, gradient = called_ppo(PPO(value_coef=2.0, value_clip=0.05), block)
    assert output.total.item() == pytest.approx(0.95**2 + 0.04 + 0.25)  # .05 is farther from 1 than .1 is
    assert gradient == pytest.approx([0, 0, 2 * 0.2, 0, 0, 2 * -0.5, 0])
    assert metric(output, "value_clip_fraction") == (1, 4)


def test_explained_variance() -> None:
    """Returns 1, 0, .1, 1 have variance .224375 (mean .525); errors -.9, .2, 0, -.5 .185 (mean -.3)."""
    output, _ = called_ppo(PPO(value_clip=None), values_block(returns=[1.0, 0.0, 0.1, 1.0]))
    pairs = {name: (float(total), float(count)) for name, (total, count) in output.metrics.items()}
    assert explained_variance(pairs) == pytest.approx(1 - 0.185 / 0.226875, rel=1e-5)
    flat, _ = called_ppo(PPO(value_clip=None), values_block(returns=[0.5] * 4))
    assert explained_variance({name: (float(t), float(c)) for name, (t, c) in flat.metrics.items()}) == 0.0


# Company, and what makes no sense.

ALL = [PPOClip(kl_coef=0.1), GSPO(**ON_ROLLOUT), CISPO(), Reinforce(aggregation="constant", constant_length=3)]


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: loss.type)
def test_an_empty_row_adds_nothing(loss: PolicyLoss) -> None:
    row = block_of(ref_logprobs=LOGPROBS)
    alone, _ = called(loss, row)
    empty = empty_block(6, 3, row.columns)
    logprobs, entropy = at_sampled(LOGPROBS), at_sampled([0.5, 1.0, 1.5])
    of_nothing = loss(TokenOutputs(logprobs=torch.zeros(6), entropy=torch.zeros(6)), empty)
    assert {(float(total), float(count)) for total, count in of_nothing.metrics.values()} == {(0.0, 0.0)}
    filled = torch.full((6,), OUTSIDE)
    batch = collate([empty, row])
    both = loss(TokenOutputs(logprobs=torch.cat([filled, logprobs]), entropy=torch.cat([filled, entropy])), batch)
    assert both.total.item() == alone.total.item()
    assert {n: tuple(map(float, pair)) for n, pair in both.metrics.items()} == {
        n: tuple(map(float, pair)) for n, pair in alone.metrics.items()
    }
    assert loss.count(batch) == loss.count(row)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"type": "gspo", "aggregation": "token"}, "one ratio a rollout"),
        ({"type": "gspo", "aggregation": "constant", "constant_length": 5}, "one ratio a rollout"),
        ({"type": "cispo", "max_ratio": 0.28}, r"1\.28 here"),
        ({"type": "cispo", "min_ratio": 1.0}, "would raise tokens"),
        ({"type": "ppo_clip", "aggregation": "constant"}, "`aggregation: constant` divides by"),
        ({"type": "ppo_clip", "constant_length": 7}, "`aggregation: constant` divides by"),
        ({"type": "ppo_clip", "kl_coef": 0.1, "kl_estimator": "k1"}, "averages to zero"),
        ({"type": "ppo_clip", "kl_estimator": "k2", "kl_unbiased": True}, "k2 is biased"),
        ({"type": "ppo_clip", "old_logprobs": "rollout", "correction": {"type": "token_mask"}}, "one and the same"),
        ({"type": "ppo_clip", "correction": {"type": "token_mask", "max_ratio": 0.9}}, "greater than 1"),
        ({"type": "ppo_clip", "dual_clip": 0.9}, "greater than 1"),
        ({"type": "reinforce", "clip_low": 0.2}, "clip_low"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], reason: str) -> None:
    kind = OneOf("burnish.losses.rl").find(PolicyLoss, fields["type"])
    with pytest.raises(ValidationError, match=reason):
        kind.model_validate(fields)


def test_what_there_is() -> None:
    assert OneOf("burnish.losses.rl").types() == ["cispo", "gspo", "ppo", "ppo_clip", "reinforce"]
    assert OneOf("burnish.corrections").types() == [
        "geometric_mask",
        "sequence_mask",
        "sequence_truncated",
        "token_mask",
        "token_truncated",
    ]
