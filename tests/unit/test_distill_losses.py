"""Distillation losses on numbers that a person can check."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from burnish.errors import ModelError
from burnish.losses.hidden_kd import HiddenKD
from burnish.losses.kd import KD
from burnish.losses.topk_kd import SMALLEST_TAIL, TopKKD
from burnish.types import Divergence, LossOutput, TokenOutputs
from burnish.workflows.distill import Distill
from tests.loss_helpers import two_documents

LN2 = math.log(2)


def _metric(output: LossOutput, name: str) -> tuple[float, float]:
    total, count = output.metrics[name]
    return float(total), float(count)


def test_kd_sums_trained_tokens_times_weight_and_temperature_squared() -> None:
    # Outputs at untrained tokens, which another loss of a sum reads, are not counted: 9s.
    full_kl = torch.tensor([9.0, 1.0, 2.0, 9.0, 0.5, 9.0])
    plain = KD()(TokenOutputs(full_kl=full_kl), two_documents())
    assert (float(plain.total), *_metric(plain, "loss")) == (3.5, 3.5, 3)  # 1 + 2 + 0.5
    weighted = KD(temperature=2.0)(TokenOutputs(full_kl=full_kl), two_documents(weight=torch.tensor([0.5, 4.0, 0.0])))
    assert float(weighted.total) == 14.0  # 4 * (0.5 * 3 + 4 * 0.5)
    assert _metric(weighted, "divergence") == (3.5, 3)  # without the 4
    assert int(KD().count(two_documents())) == 3


def test_kd_says_which_divergence_it_needs() -> None:
    assert KD().divergence == Divergence("forward", 0.5, 1.0)
    assert KD(kind="jsd", beta=0.1, temperature=3).divergence == Divergence("jsd", 0.1, 3.0)
    with pytest.raises(ValidationError, match="less than 1"):
        KD(kind="jsd", beta=1.0)  # m = q then: nothing of the policy is left in the mixture


def _topk(student: list[list[float]], teacher: list[list[float]], loss: TopKKD) -> LossOutput:
    """One document of three tokens, the last two trained; probabilities of two of the teacher's tokens at each."""
    block = two_documents(teacher_topk_logprobs=torch.tensor([[0.0, 0.0], *teacher] + [[0.0, 0.0]] * 3).log())
    block.columns["teacher_topk_logprobs"][[0, 3, 4, 5]] = 0.0  # what columns hold where nothing was asked
    block.loss_mask[4] = False
    topk_logprobs = torch.zeros(6, 2)
    topk_logprobs[1:3] = torch.tensor(student).log()
    return loss(TokenOutputs(topk_logprobs=topk_logprobs), block)


def test_topk_kd_merges_the_tail_into_one_category() -> None:
    # Teacher (1/2, 1/4 | 1/4), student (1/4, 1/4 | 1/2) at the first; equal at the second.
    student, teacher = [[0.25, 0.25], [0.5, 0.25]], [[0.5, 0.25], [0.5, 0.25]]
    forward = _topk(student, teacher, TopKKD())
    # 1/2 ln 2 + 0 + 1/4 ln 1/2 = 1/4 ln 2
    assert float(forward.total) == pytest.approx(LN2 / 4, abs=1e-6)
    assert _metric(forward, "loss") == (pytest.approx(LN2 / 4, abs=1e-6), 2)
    assert _metric(forward, "teacher_tail") == (pytest.approx(0.5), 2)  # 1/4 at each
    # 1/4 ln 1/2 + 0 + 1/2 ln 2 = 1/4 ln 2 again; a student of (1/8, 1/8 | 3/4) has -(1/8 ln 4 + 1/8 ln 2) + 3/4 ln 3
    reverse = _topk([[0.125, 0.125], [0.5, 0.25]], teacher, TopKKD(kind="reverse"))
    assert float(reverse.total) == pytest.approx(0.75 * math.log(3) - 3 / 8 * LN2, abs=1e-6)


def test_topk_kd_of_the_whole_vocabulary_is_the_forward_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64).log_softmax(2)
    block = two_documents(teacher_topk_logprobs=teacher)
    ours = TopKKD()(TokenOutputs(topk_logprobs=student), block).total
    expected = (teacher.exp() * (teacher - student)).sum(1)[block.loss_mask].sum()
    assert float(ours) == pytest.approx(float(expected), abs=1e-9)  # both tails are SMALLEST_TAIL: they say nothing


def test_topk_kd_survives_rounding() -> None:
    """Masses that round to 1 or above, as float32 log-probabilities of sharp models do, leave a tail of 1e-6."""
    over = torch.tensor([0.99999994, 6e-7]).log().repeat(6, 1).requires_grad_()  # their sum is 1 + 5e-7
    teacher = torch.tensor([0.7, 0.2]).log().repeat(6, 1)
    output = TopKKD()(TokenOutputs(topk_logprobs=over), two_documents(teacher_topk_logprobs=teacher))
    one = 0.7 * math.log(0.7) + 0.2 * math.log(0.2 / 6e-7) + 0.1 * math.log(0.1 / SMALLEST_TAIL)
    assert float(output.total.detach()) == pytest.approx(3 * one, rel=1e-5)
    (gradient,) = torch.autograd.grad(output.total, over)
    assert gradient.isfinite().all() and not gradient[[0, 3, 5]].any()


def test_hidden_kd_compares_states_of_trained_tokens() -> None:
    student = torch.zeros(6, 2)
    teacher = torch.tensor([[9.0, 9.0], [1.0, 3.0], [0.0, 2.0], [9.0, 9.0], [2.0, 0.0], [0.0, 0.0]])
    output = HiddenKD()(TokenOutputs(hidden_states=student), two_documents(teacher_hidden=teacher))
    assert float(output.total) == 9.0  # (1 + 9) / 2 + (0 + 4) / 2 + (4 + 0) / 2
    assert _metric(output, "loss") == (9.0, 3)
    # cosine: the same direction, the opposite, at right angles
    student = torch.tensor([[0.0, 0.0], [2.0, 6.0], [0.0, -1.0], [0.0, 0.0], [0.0, 5.0], [0.0, 0.0]])
    output = HiddenKD(kind="cosine")(TokenOutputs(hidden_states=student), two_documents(teacher_hidden=teacher))
    assert float(output.total) == pytest.approx(0 + 2 + 1, abs=1e-6)
    assert HiddenKD().needs == {"hidden_states"}


def test_hidden_kd_through_a_head_reads_the_state_before_each_trained_token() -> None:
    """Tokens 1, 2 and 4 are trained; the states they are drawn from are those at 0, 1 and 3."""
    loss = HiddenKD(head="wide")
    teacher = torch.tensor([[9.0], [1.0], [2.0], [9.0], [3.0], [0.0]])
    block = two_documents(teacher_hidden=teacher)
    assert loss.needs == {"scores"} and loss.heads() == {"wide": "numbers"}
    assert loss.reads(block).tolist() == [True, True, False, True, False, False]
    scores = torch.tensor([[1.0], [2.0], [7.0], [0.0], [7.0], [7.0]])
    output = loss(TokenOutputs(scores={"wide": scores}), block)
    assert float(output.total) == 9.0  # 0 + 0 + 3^2
    assert int(loss.count(block)) == 3
    block.columns["weight"] = torch.tensor([1.0, 0.5, 0.0])
    assert float(loss(TokenOutputs(scores={"wide": scores}), block).total) == 4.5


def test_hidden_kd_of_other_widths_says_what_to_do() -> None:
    with pytest.raises(ModelError, match=r"4 wide, the teacher's 6\n.*size: 6"):
        HiddenKD()(TokenOutputs(hidden_states=torch.zeros(6, 4)), two_documents(teacher_hidden=torch.zeros(6, 6)))


ONLINE, CACHED = {"path": "teacher"}, {"cache": "runs/cache", "top_k": 32}
SUM = {"type": "sum", "terms": [{"loss": {"type": "kd"}}, {"weight": 0.5, "loss": {"type": "nll"}}]}


@pytest.mark.parametrize(
    ("loss", "teacher", "reason"),
    [
        ({"type": "kd"}, CACHED, "keeps the likeliest 32 tokens: use `loss: {type: topk_kd}`"),
        (SUM, CACHED, "the loss sum compares whole distributions"),
        ({"type": "hidden_kd"}, CACHED, "hidden states, and a cache keeps none"),
        ({"type": "nll"}, ONLINE, "asks nothing of the teacher: use `workflow: {type: sft}`"),
        ({"type": "dpo"}, ONLINE, "asks ref_logprobs, which a teacher does not say"),
        ({"type": "topk_kd"}, {}, "a teacher is named by"),
        ({"type": "topk_kd"}, CACHED | {"top_k": 0}, "greater than or equal to 1"),
    ],
)
def test_what_a_teacher_cannot_answer_is_refused(loss: dict[str, Any], teacher: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        Distill.model_validate({"loss": loss, "teacher": teacher})
    assert reason in str(refusal.value)


@pytest.mark.parametrize(
    ("loss", "teacher"),
    [({"type": "kd"}, ONLINE), (SUM, ONLINE), ({"type": "hidden_kd"}, ONLINE), ({"type": "topk_kd"}, ONLINE),
     ({"type": "topk_kd"}, CACHED)],
)  # fmt: skip
def test_what_a_teacher_answers_is_accepted(loss: dict[str, Any], teacher: dict[str, Any]) -> None:
    workflow = Distill.model_validate({"loss": loss, "teacher": teacher})
    assert workflow.losses()[0].type == loss["type"] and workflow.second() is workflow.teacher
