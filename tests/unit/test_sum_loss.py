"""Sums of losses: what they ask for, how they are counted and named, and which do not go together."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from burnish.component import OneOf
from burnish.losses.base import Loss
from burnish.losses.cpo import CPO
from burnish.losses.dpo import DPO
from burnish.losses.nll import NLL
from burnish.losses.sum import Sum
from burnish.types import Block, LossOutput, TokenOutputs
from tests.preference_helpers import Answer, answer_block

PAIRS = [
    [Answer([-0.5, -1.25, -0.25], [-0.75, -1.0, -1.5], 1, 2.0), Answer([-2.0], [-1.0], -1, 2.0)],
    [Answer([-3.0], [-1.5], 1, 0.5), Answer([-0.125, -4.0, -2.5, -0.25], [-1.0, -2.0, -3.0, -0.5], -1, 0.5)],
]


def summed(*terms: object) -> Sum:
    return Sum.model_validate({"terms": list(terms)})


DPO_AND_NLL = summed({"loss": {"type": "dpo", "beta": 0.5}}, {"weight": 0.25, "loss": {"type": "nll"}})


def called(loss: Loss, block: Block, logprobs: Tensor) -> LossOutput:
    return loss(TokenOutputs(logprobs=logprobs), block)


def floats(output: LossOutput) -> dict[str, tuple[float, float]]:
    return {name: (float(total), float(count)) for name, (total, count) in output.metrics.items()}


def test_it_asks_for_what_its_terms_ask_for() -> None:
    assert DPO_AND_NLL.needs == {"logprobs"}  # one projection: the likelihood is made of the log-probabilities
    assert DPO_AND_NLL.asks == {"ref_logprobs"}
    assert DPO_AND_NLL.rows == "preference"
    assert summed({"loss": {"type": "nll"}}).rows == "conversation"
    both = summed({"loss": {"type": "kd", "kind": "reverse"}}, {"loss": {"type": "nll"}})
    assert both.needs == {"full_kl", "logprobs"}
    assert both.divergence is not None and both.divergence.kind == "reverse"
    heads = summed({"loss": {"type": "regression", "label": "stars"}}, {"loss": {"type": "nll"}})
    assert heads.needs == {"scores", "logprobs"}
    assert (heads.labels(), heads.heads()) == ({"stars": "score"}, {"score": "number"})


def test_it_reads_what_any_term_reads() -> None:
    block, _ = answer_block(PAIRS, shared=True, row_length=16)
    chosen = [False] * 2 + [True] * 3 + [False] * 3 + [True] + [False] * 7
    answers = [False] * 2 + [True] * 4 + [False] * 2 + [True] * 5 + [False] * 3
    assert summed({"loss": {"type": "nll"}}).reads(block).tolist() == chosen
    assert DPO_AND_NLL.reads(block).tolist() == answers


def test_each_term_is_weighted_and_counted_by_itself() -> None:
    """Two pairs, and 3 + 1 chosen tokens of -2 and -3 with row weights 2 and 0.5: 2 * 2 + 0.5 * 3 = 5.5 nats."""
    block, logprobs = answer_block(PAIRS, shared=True)
    output = called(DPO_AND_NLL, block, logprobs)
    dpo = called(DPO(beta=0.5), block, logprobs)
    assert output.total.tolist() == pytest.approx([dpo.total.item(), 0.25 * 5.5])
    assert DPO_AND_NLL.count(block).tolist() == [2, 4]


def test_the_gradient_is_the_sum_of_the_terms() -> None:
    block, logprobs = answer_block(PAIRS, shared=True)
    leaf = logprobs.clone().requires_grad_()
    called(DPO_AND_NLL, block, leaf).total.sum().backward()
    alone = logprobs.clone().requires_grad_()
    called(DPO(beta=0.5), block, alone).total.backward()
    assert alone.grad is not None
    torch.testing.assert_close(leaf.grad, alone.grad - 0.25 * NLL().coefficients(block), rtol=1e-6, atol=1e-7)


def test_colliding_metrics_have_their_terms_name() -> None:
    block, logprobs = answer_block(PAIRS, shared=True)
    metrics = floats(called(DPO_AND_NLL, block, logprobs))
    dpo = floats(called(DPO(beta=0.5), block, logprobs))
    assert metrics.pop("dpo/loss") == dpo.pop("loss")
    assert metrics.pop("nll/loss") == (5.5, 4)  # without its weight in the sum
    assert metrics == dpo  # `rewards/chosen` and the others have no namesake; no `loss`, which the policy adds up


def test_two_terms_of_one_type_are_numbered() -> None:
    block, logprobs = answer_block(PAIRS, shared=True)
    twice = summed({"loss": {"type": "dpo", "beta": 0.5}}, {"loss": {"type": "dpo", "beta": 1.0}})
    metrics = floats(called(twice, block, logprobs))
    one, two = floats(called(DPO(beta=0.5), block, logprobs)), floats(called(DPO(beta=1.0), block, logprobs))
    assert metrics == {f"dpo/{name}": pair for name, pair in one.items()} | {
        f"dpo_2/{name}": pair for name, pair in two.items()
    }


def test_a_term_with_two_totals_keeps_them() -> None:
    block, logprobs = answer_block(PAIRS, shared=True)
    loss = summed({"weight": 0.5, "loss": {"type": "cpo"}}, {"loss": {"type": "dpo", "beta": 0.5}})
    output = called(loss, block, logprobs)
    cpo, dpo = called(CPO(), block, logprobs), called(DPO(beta=0.5), block, logprobs)
    assert output.total.tolist() == pytest.approx([*(0.5 * cpo.total).tolist(), dpo.total.item()])
    assert loss.count(block).tolist() == [2, 4, 2]


def test_it_survives_a_recipe() -> None:
    plain = DPO_AND_NLL.model_dump(mode="json")
    assert plain["terms"][1] == {"weight": 0.25, "loss": {"type": "nll"}}
    found = OneOf("burnish.losses").find(Loss, "sum").model_validate(plain)
    assert found == DPO_AND_NLL


@pytest.mark.parametrize(
    ("terms", "reason"),
    [
        ([{"loss": {"type": "dpo"}}, {"loss": {"type": "kto"}}], "rows of different kinds, preference and unpaired"),
        ([{"loss": {"type": "kd"}}, {"loss": {"type": "kd"}}], "kd and kd both need full_kl"),
        ([{"loss": {"type": "nll"}}, {"loss": {"type": "ranking"}}], "ranking measures a model and has no gradient"),
        (
            [{"loss": {"type": "regression", "label": "stars"}}, {"loss": {"type": "classification"}}],
            "regression reads the head 'score' as `number`, another term as `classes`",
        ),
        ([{"loss": {"type": "sum", "terms": [{"loss": {"type": "nll"}}]}}], "no type 'sum'"),
        ([{"loss": {"type": "dpo"}, "weight": -1.0}], "greater than or equal to 0"),
        ([{"loss": {"type": "dp0"}}], "did you mean 'dpo'"),
        ([], "at least 1 item"),
    ],
)
def test_sums_that_are_refused(terms: list[object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        summed(*terms)
