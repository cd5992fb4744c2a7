"""Preference losses on log-probabilities laid by hand: against the papers' formulas in float64, and by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from burnish.data.packing.layout import empty_block
from burnish.losses.apo_down import APODown
from burnish.losses.apo_zero import APOZero
from burnish.losses.base import Loss
from burnish.losses.cpo import CPO
from burnish.losses.dpo import DPO
from burnish.losses.hinge import Hinge
from burnish.losses.ipo import IPO
from burnish.losses.kto import KTO
from burnish.losses.nll import NLL
from burnish.losses.orpo import ORPO
from burnish.losses.pairs import PairLoss, Pairs
from burnish.losses.robust import Robust
from burnish.losses.simpo import SimPO
from burnish.types import Block, LossOutput, TokenOutputs, collate
from tests.preference_helpers import Answer, Pair, answer_block

PAIRS: list[Pair] = [
    (Answer([-0.5, -1.25, -0.25], [-0.75, -1.0, -1.5], 1, 2.0), Answer([-2.0], [-1.0], -1, 2.0)),
    (Answer([-3.0], [-1.5], 1, 0.5), Answer([-0.125, -4.0, -2.5, -0.25], [-1.0, -2.0, -3.0, -0.5], -1, 0.5)),
    (Answer([-1.0, -0.375], [-2.0, -2.5], 1), Answer([-6.0, -3.0], [-2.0, -0.5], -1)),
]
"""Uneven lengths and weights; log-ratios of 1.25 and -1, -1.5 and -0.375, 3.125 and -6.5."""


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log(1 + torch.exp(-x))


def of_ratios(formula: Callable[[Tensor, Tensor], Tensor], *, mean: bool = False) -> Callable[..., Tensor]:
    """A formula of the log-ratios of a pair, as a function of four vectors of its tokens' log-probabilities."""

    def loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
        c, r = chosen - ref_chosen, rejected - ref_rejected
        return formula(c.mean(), r.mean()) if mean else formula(c.sum(), r.sum())

    return loss


def orpo(chosen: Tensor, rejected: Tensor, _ref_chosen: Tensor, _ref_rejected: Tensor) -> Tensor:
    p_c, p_r = chosen.mean().exp(), rejected.mean().exp()  # eq. 3
    odds_ratio = (p_c / (1 - p_c)) / (p_r / (1 - p_r))  # eq. 4 and 5
    return -torch.log(p_c) - 0.3 * log_sigmoid(torch.log(odds_ratio))  # eq. 6 and 7


def simpo(chosen: Tensor, rejected: Tensor, _ref_chosen: Tensor, _ref_rejected: Tensor) -> Tensor:
    return -log_sigmoid(1.5 / len(chosen) * chosen.sum() - 1.5 / len(rejected) * rejected.sum() - 0.7)


CASES = [
    pytest.param(DPO(beta=0.4), of_ratios(lambda c, r: -log_sigmoid(0.4 * (c - r))), id="dpo"),
    pytest.param(
        DPO(beta=0.4, label_smoothing=0.2),
        of_ratios(lambda c, r: -0.8 * log_sigmoid(0.4 * (c - r)) - 0.2 * log_sigmoid(-0.4 * (c - r))),
        id="dpo-smoothed",
    ),
    pytest.param(
        DPO(beta=5.0, length_normalised=True),
        of_ratios(lambda c, r: -log_sigmoid(5 * (c - r)), mean=True),
        id="dpo-length-normalised",
    ),
    pytest.param(Hinge(beta=0.4), of_ratios(lambda c, r: torch.relu(1 - 0.4 * (c - r))), id="hinge"),
    pytest.param(IPO(beta=0.4), of_ratios(lambda c, r: (c - r - 1 / 0.8) ** 2, mean=True), id="ipo"),
    pytest.param(
        IPO(beta=0.4, length_normalised=False), of_ratios(lambda c, r: (c - r - 1 / 0.8) ** 2), id="ipo-of-sums"
    ),
    pytest.param(
        Robust(beta=0.4, label_smoothing=0.2),
        of_ratios(lambda c, r: (-0.8 * log_sigmoid(0.4 * (c - r)) + 0.2 * log_sigmoid(-0.4 * (c - r))) / 0.6),
        id="robust",
    ),
    pytest.param(
        APOZero(beta=0.4), of_ratios(lambda c, r: 1 - torch.sigmoid(0.4 * c) + torch.sigmoid(0.4 * r)), id="apo_zero"
    ),
    pytest.param(
        APODown(beta=0.4),
        of_ratios(lambda c, r: 1 + torch.sigmoid(0.4 * c) - torch.sigmoid(0.4 * (c - r))),
        id="apo_down",
    ),
    pytest.param(SimPO(beta=1.5, gamma=0.7), simpo, id="simpo"),
    pytest.param(ORPO(beta=0.3), orpo, id="orpo"),
]


def called(loss: Loss, block: Block, logprobs: Tensor) -> tuple[LossOutput, Tensor]:
    """(output, gradient by each token's log-probability)"""
    leaf = logprobs.clone().requires_grad_()
    output = loss(TokenOutputs(logprobs=leaf), block)
    output.total.sum().backward()
    assert leaf.grad is not None
    return output, leaf.grad


def float64(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("shared", [True, False], ids=["shared-prompt", "own-prompts"])
@pytest.mark.parametrize(("loss", "formula"), CASES)
def test_a_loss_and_its_gradient_are_the_papers(loss: Loss, formula: Callable[..., Tensor], shared: bool) -> None:
    """Weights multiply, every pair counts 1; prompts, padding and unused entries have no part in it."""
    output, gradient = called(loss, *answer_block([list(pair) for pair in PAIRS], shared=shared))
    expected, gradients = torch.zeros((), dtype=torch.float64), []
    prompt = torch.zeros(2, dtype=torch.float64)
    for chosen, rejected in PAIRS:
        leaves = float64(chosen.logprobs), float64(rejected.logprobs)
        term = chosen.weight * formula(*leaves, float64(chosen.ref_logprobs), float64(rejected.ref_logprobs))
        term.backward()
        expected += term.detach()
        gradients += [prompt, leaves[0].grad] + ([] if shared else [prompt]) + [leaves[1].grad]
    assert output.total.item() == pytest.approx(expected.item(), rel=1e-12)
    by_token = torch.nn.functional.pad(torch.cat(gradients), (0, 64 - sum(map(len, gradients))))
    torch.testing.assert_close(gradient.double(), by_token, rtol=2e-7, atol=1e-9)
    summed, count = output.metrics["loss"]
    assert (float(summed), int(count)) == (output.total.item(), 3)
    assert loss.count(answer_block([list(pair) for pair in PAIRS], shared=shared)[0]) == 3


@pytest.mark.parametrize("loss", [case.values[0] for case in CASES] + [CPO()], ids=[c.id for c in CASES] + ["cpo"])
def test_neither_order_nor_company_matters(loss: Loss) -> None:
    """Rejected before chosen, pairs the other way round, an empty row between: the sums are the same."""
    block, logprobs = answer_block([list(pair) for pair in PAIRS], shared=True)
    expected, _ = called(loss, block, logprobs)
    one, one_logprobs = answer_block([PAIRS[2][::-1]], shared=True)
    two, two_logprobs = answer_block([PAIRS[1], PAIRS[0][::-1]], shared=True)
    batch = collate([one, empty_block(64, 16, one.columns), two])
    found, _ = called(loss, batch, torch.cat([one_logprobs, torch.full((64,), -7.0), two_logprobs]))
    torch.testing.assert_close(found.total, expected.total, rtol=1e-12, atol=0)
    assert found.metrics.keys() == expected.metrics.keys()
    for name, (summed, count) in expected.metrics.items():
        assert tuple(map(float, found.metrics[name])) == pytest.approx((float(summed), float(count))), name
    assert loss.count(batch).tolist() == loss.count(block).tolist()


@pytest.mark.parametrize(
    "loss", [case.values[0] for case in CASES] + [CPO(), KTO()], ids=[c.id for c in CASES] + ["cpo", "kto"]
)
def test_an_empty_row_adds_nothing(loss: Loss) -> None:
    full, _ = answer_block([list(PAIRS[0])], shared=True)
    block = empty_block(64, 16, {**full.columns, "kto_kl": torch.zeros(16)})
    output, gradient = called(loss, block, torch.zeros(64))
    assert not output.total.any() and not gradient.any() and not loss.count(block).any()
    assert {(float(summed), float(count)) for summed, count in output.metrics.values()} == {(0.0, 0.0)}


# log-ratios of 3 and -1 in 2 tokens and 1, so h = 4 as sums and 1.5 + 1 = 2.5 as means
ONE: list[list[Answer]] = [[Answer([-1.0, -1.0], [-2.0, -3.0], 1), Answer([-2.0], [-1.0], -1)]]


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (DPO(beta=0.5), 0.126928),  # m = 2: log(1 + e^-2)
        (DPO(beta=0.5, label_smoothing=0.25), 0.626928),  # 0.75 * 0.126928 + 0.25 * (0.126928 + 2)
        (DPO(beta=2.0, length_normalised=True), 0.0067153),  # m = 5: log(1 + e^-5)
        (Hinge(beta=0.5), 0.0),  # 1 - 2 < 0
        (Hinge(beta=0.1), 0.6),  # 1 - 0.4
        (IPO(beta=0.25), 0.25),  # (2.5 - 2)^2
        (IPO(beta=0.25, length_normalised=False), 4.0),  # (4 - 2)^2
        (Robust(beta=0.5, label_smoothing=0.25), -0.873072),  # (0.75 * 0.126928 - 0.25 * 2.126928) / 0.5
        (APOZero(beta=0.5), 0.559966),  # 1 - sigmoid(1.5) + sigmoid(-0.5) = 1 - 0.817574 + 0.377541
        (APODown(beta=0.5), 0.936777),  # sigmoid(1.5) + 1 - sigmoid(2) = 0.817574 + 1 - 0.880797
        (SimPO(beta=2.0, gamma=1.0), 0.313262),  # 2 * (-1 + 2) - 1 = 1: log(1 + e^-1)
        # odds e^-1 / (1 - e^-1) = 0.581977 and e^-2 / (1 - e^-2) = 0.156518, ratio 3.718282:
        # 1 - 0.1 * log(3.718282 / 4.718282)
        (ORPO(beta=0.1), 1.023819),
    ],
    ids=lambda value: value.type if isinstance(value, Loss) else str(value),
)
def test_by_hand(loss: Loss, value: float) -> None:
    output, _ = called(loss, *answer_block(ONE, shared=True))
    assert output.total.item() == pytest.approx(value, abs=2e-6)


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (DPO(), math.log(2)),
        (DPO(label_smoothing=0.3, length_normalised=True), math.log(2)),
        (Robust(), math.log(2)),
        (Hinge(), 1.0),
        (IPO(), 25.0),  # (0 - 1 / 0.2)^2
        (APOZero(), 1.0),  # 1 - 1/2 + 1/2
        (APODown(), 1.0),
    ],
    ids=lambda value: value.type if isinstance(value, Loss) else str(value),
)
def test_where_the_policy_is_the_reference(loss: Loss, value: float) -> None:
    """Exact however long the answers are: 3000 tokens of -0.7 sum to -2100, where float32 steps by 2.4e-4."""
    long, short = [-0.7] * 3000, [-1.3] * 11
    block, logprobs = answer_block([[Answer(long, long, 1), Answer(short, short, -1)]], shared=True, row_length=3072)
    output, _ = called(loss, block, logprobs)
    assert output.total.item() == pytest.approx(value, abs=1e-12)
    assert float(output.metrics["rewards/accuracies"][0]) == 0  # none is ahead


def test_metrics_of_pairs() -> None:
    """Sums over three pairs, whatever they weigh, of beta times the log-ratios; two of three chosen are ahead."""
    output, _ = called(DPO(beta=0.5), *answer_block([list(pair) for pair in PAIRS], shared=False))
    metrics = {name: (float(summed), float(count)) for name, (summed, count) in output.metrics.items()}
    del metrics["loss"]
    assert metrics == {
        "rewards/chosen": (1.4375, 3),  # 0.5 * (1.25 - 1.5 + 3.125)
        "rewards/rejected": (-3.9375, 3),  # 0.5 * (-1 - 0.375 - 6.5)
        "rewards/margins": (5.375, 3),
        "rewards/accuracies": (2, 3),  # -1.5 < -0.375
        "logps/chosen": (-6.375, 3),  # -2 - 3 - 1.375
        "logps/rejected": (-17.875, 3),  # -2 - 6.875 - 9
    }


def test_rewards_are_what_the_loss_compares() -> None:
    simpo, _ = called(SimPO(beta=2.0), *answer_block(ONE, shared=True))
    assert [float(simpo.metrics[f"rewards/{name}"][0]) for name in ("chosen", "rejected", "margins")] == [-2, -4, 2]
    ipo, _ = called(IPO(beta=0.5), *answer_block(ONE, shared=True))
    assert [float(ipo.metrics[f"rewards/{name}"][0]) for name in ("chosen", "rejected")] == [0.75, -0.5]


def test_robust_is_unbiased_under_flipped_labels() -> None:
    """0.7 of the loss of a pair and 0.3 of that of the pair flipped make the DPO loss of the pair."""
    flipped = [[Answer(a.logprobs, a.ref_logprobs, -a.preference) for a in ONE[0]]]
    right, wrong = (
        called(Robust(beta=0.5, label_smoothing=0.3), *answer_block(g, shared=True))[0] for g in (ONE, flipped)
    )
    dpo, _ = called(DPO(beta=0.5), *answer_block(ONE, shared=True))
    assert (0.7 * right.total + 0.3 * wrong.total).item() == pytest.approx(dpo.total.item(), rel=1e-12)


class Exponential(PairLoss):
    """exp(-m), m the difference of the log-ratios."""

    def compare(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected = pairs.ratios(mean=False)
        return (rejected - chosen).exp(), chosen, rejected


def test_a_loss_on_pairs_is_its_formula() -> None:
    """Weights of 2, 0.5 and 1; differences of 2.25, -1.125, 9.625; unused entries, where exp(0) = 1, count 0."""
    loss = Exponential(type="own:Exponential")
    block, logprobs = answer_block([list(pair) for pair in PAIRS], shared=True)
    output, _ = called(loss, block, logprobs)
    expected = 2 * math.exp(-2.25) + 0.5 * math.exp(1.125) + math.exp(-9.625)
    assert output.total.item() == pytest.approx(expected, rel=1e-12)
    assert (loss.rows, loss.asks, int(loss.count(block))) == ("preference", {"ref_logprobs"}, 3)
    dpo, _ = called(DPO(beta=1.0), block, logprobs)
    assert {n: v for n, v in output.metrics.items() if n != "loss"} == {
        n: v for n, v in dpo.metrics.items() if n != "loss"
    }


def test_a_group_with_one_side_only_is_no_pair() -> None:
    block, logprobs = answer_block([[PAIRS[0][0]], [PAIRS[1][1]], list(PAIRS[2])], shared=True)
    for loss in (DPO(), ORPO(), CPO()):
        output, gradient = called(loss, block, logprobs)
        alone, _ = called(loss, *answer_block([list(PAIRS[2])], shared=True))
        assert torch.equal(output.total, alone.total)
        assert not gradient[:10].any()  # 2 + 3 and 2 + 4 tokens, before the pair's prompt: 11 in all
        assert loss.count(block).reshape(-1)[0] == 1


def test_orpo_of_a_memorised_answer_is_finite() -> None:
    """A probability that float32 rounds to 1 has infinite odds; the gradient is the likelihood's, and nothing more."""
    block, logprobs = answer_block([[Answer([0.0, 0.0], [0.0, 0.0], 1), Answer([-2.0], [-2.0], -1)]], shared=True)
    output, gradient = called(ORPO(), block, logprobs)
    assert output.total.item() == pytest.approx(0.0, abs=1e-6)
    assert gradient[2:4].tolist() == pytest.approx([-0.5, -0.5])  # d(-mean)/d each of 2 tokens
    assert math.isfinite(float(output.metrics["log_odds_ratio"][0]))


def test_cpo_counts_pairs_and_tokens() -> None:
    """One total a term: the preference by pair, the likelihood of chosen answers by token."""
    loss = CPO(beta=0.4, cpo_alpha=0.7)
    block, logprobs = answer_block([list(pair) for pair in PAIRS], shared=True)
    output, gradient = called(loss, block, logprobs)
    expected = torch.zeros(2, dtype=torch.float64)
    by_chosen_token = []
    for chosen, rejected in PAIRS:
        c, r = float64(chosen.logprobs), float64(rejected.logprobs)
        preference = -chosen.weight * log_sigmoid(0.4 * c.sum() - 0.4 * r.sum())
        nll = -chosen.weight * c.sum()
        (preference + 0.7 * nll).backward()
        by_chosen_token.append(c.grad)
        expected += torch.stack([preference.detach(), 0.7 * nll.detach()])
    torch.testing.assert_close(output.total.detach(), expected, rtol=1e-12, atol=0)
    assert loss.count(block).tolist() == [3, 6]  # 3 + 1 + 2 chosen tokens
    torch.testing.assert_close(gradient[2:5].double(), by_chosen_token[0], rtol=2e-7, atol=0)
    assert "loss" not in output.metrics  # no (sum, count) can say it: the policy adds the divided terms up
    assert tuple(map(float, output.metrics["nll_loss"])) == (6.875, 6)  # 2 * 2 + 0.5 * 3 + 1.375


KTO_ANSWERS = [
    Answer([-0.5, -1.25, -0.25], [-0.75, -1.0, -1.5], 1, 2.0),  # log-ratio 1.25
    Answer([-2.0], [-1.0], -1),  # -1
    Answer([-3.0], [-1.5], 1),  # -1.5
    Answer([-0.25, -0.5], [-1.0, -2.5], -1, 0.5),  # 2.75
]


@pytest.mark.parametrize("kl", [0.5, 0.0])
def test_kto_is_the_papers(kl: float) -> None:
    """Section 4: lambda_y - v, v = lambda_d sigmoid(beta (r - z)) or lambda_u sigmoid(beta (z - r))."""
    loss = KTO(beta=0.4, desirable_weight=1.5, undesirable_weight=0.75)
    block, logprobs = answer_block([[answer] for answer in KTO_ANSWERS], shared=False)
    block.columns["kto_kl"] = torch.full((16,), kl, requires_grad=True)
    output, gradient = called(loss, block, logprobs)
    expected, gradients = 0.0, []
    for answer in KTO_ANSWERS:
        leaf = float64(answer.logprobs)
        gap = (leaf - float64(answer.ref_logprobs)).sum() - kl
        value = 1.5 * torch.sigmoid(0.4 * gap) if answer.preference > 0 else 0.75 * torch.sigmoid(-0.4 * gap)
        term = answer.weight * ((1.5 if answer.preference > 0 else 0.75) - value)
        term.backward()
        expected += term.item()
        gradients += [torch.zeros(2, dtype=torch.float64), leaf.grad]
    assert output.total.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradient[:15].double(), torch.cat(gradients), rtol=2e-7, atol=1e-9)
    assert block.columns["kto_kl"].grad is None  # a constant
    assert loss.count(block) == 4


def test_kto_by_hand() -> None:
    """Log-ratios 2 and -1 around a KL of 0.5, beta 1: both on their side, each 1 - sigmoid(1.5) = 0.182426."""
    answers = [[Answer([-1.0], [-3.0], 1)], [Answer([-2.0], [-1.0], -1)]]
    block, logprobs = answer_block(answers, shared=True)
    block.columns["kto_kl"] = torch.full((16,), 0.5)
    output, _ = called(KTO(beta=1.0), block, logprobs)
    assert {name: tuple(map(float, pair)) for name, pair in output.metrics.items()} == {
        "loss": (pytest.approx(2 * 0.182426, abs=1e-6), 2),
        "kl": (1.0, 2),  # the same for both answers, so its mean is the estimate; prompts do not count
        "rewards/chosen": (2.0, 1),
        "rewards/rejected": (-1.0, 1),
        "rewards/accuracies": (2.0, 2),
        "logps/chosen": (-1.0, 1),
        "logps/rejected": (-2.0, 1),
    }
    one_class, _ = called(KTO(beta=1.0), *_with_kl([answers[0]]))
    assert tuple(map(float, one_class.metrics["rewards/rejected"])) == (0.0, 0.0)


def _with_kl(groups: list[list[Answer]]) -> tuple[Block, Tensor]:
    block, logprobs = answer_block(groups, shared=True)
    block.columns["kto_kl"] = torch.zeros(16)
    return block, logprobs


def test_nll_of_preference_data_is_of_chosen_answers() -> None:
    """Prompt 2, chosen 3, rejected 1; prompt 2, chosen 1, rejected 4; padding 3: trained with weights 2 and 0.5."""
    block, _ = answer_block([list(pair) for pair in PAIRS[:2]], shared=True, row_length=16)
    assert NLL().coefficients(block).tolist() == [0, 0, 2, 2, 2, 0, 0, 0, 0.5, 0, 0, 0, 0, 0, 0, 0]
    assert NLL().reads(block).tolist() == [False] * 2 + [True] * 3 + [False] * 3 + [True] + [False] * 7
    assert NLL().count(block) == 4
