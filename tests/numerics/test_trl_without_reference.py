"""CPO, SimPO and ORPO beside TRL's trainers, which compute SimPO in its CPOTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from burnish.losses.base import Loss
from burnish.losses.cpo import CPO
from burnish.losses.orpo import ORPO
from burnish.losses.simpo import SimPO
from burnish.types import Block
from tests.trl_helpers import (
    BATCH,
    OF_LOSSES,
    assert_together,
    burnish_policy,
    metric_apart,
    packed,
    pair_rows,
    rendered,
    steps_of,
    with_trl,
    write_model,
)

STEPS = 4
CASES: dict[str, tuple[Loss, dict[str, Any]]] = {
    "cpo": (CPO(beta=0.2, cpo_alpha=0.5), {"beta": 0.2, "cpo_alpha": 0.5}),
    "simpo": (
        SimPO(beta=2.5, gamma=0.8),
        {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.5, "simpo_gamma": 0.8},
    ),
}


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL warns of its experimental part at import."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", CASES)
def test_losses_are_trls(name: str, folder: Path, tmp_path: Path) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    loss, config = CASES[name]
    rows = pair_rows(STEPS * BATCH)
    with burnish_policy(folder, tmp_path) as policy:
        ours = steps_of(policy, rendered(folder, rows, "preference"), loss)
    theirs = with_trl(CPOTrainer, CPOConfig, folder, rows, tmp_path, remove_unused_columns=False, **config)
    assert_together(ours, theirs)
    for metric in ("rewards/chosen", "rewards/rejected", "rewards/accuracies"):
        assert metric_apart(metric, ours, theirs) < 1e-4, metric


def test_orpo_is_trls_but_for_the_likelihood_which_there_is_of_prompts_too(folder: Path, tmp_path: Path) -> None:
    """The paper's first term is of the answer: here its tokens' mean, then the mean over pairs. TRL's is the mean over
    all tokens of prompts and chosen answers. What TRL calls `log_odds_chosen` is `log_odds_ratio` here and in the
    paper, and its `log_odds_ratio` is the log-sigmoid of that.
    """
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    rows = pair_rows(BATCH)
    with burnish_policy(folder, tmp_path) as policy:
        groups = rendered(folder, rows, "preference")
        blocks = packed(groups)
        of_all_tokens = mean_over_prompts_and_chosen(blocks, policy.logprobs(blocks))
        ours = steps_of(policy, groups, ORPO(beta=0.5))
    theirs = with_trl(ORPOTrainer, ORPOConfig, folder, rows, tmp_path, remove_unused_columns=False, beta=0.5)
    (mine,), (other,) = ours.metrics, theirs.metrics
    assert other["nll_loss"] == pytest.approx(of_all_tokens, abs=OF_LOSSES)
    assert abs(other["nll_loss"] - mine["nll_loss"]) > 0.05
    assert theirs.losses[0] - other["nll_loss"] == pytest.approx(mine["loss"] - mine["nll_loss"], abs=OF_LOSSES)
    assert other["log_odds_chosen"] == pytest.approx(mine["log_odds_ratio"], abs=OF_LOSSES)
    assert other["log_odds_ratio"] == pytest.approx((mine["nll_loss"] - mine["loss"]) / 0.5, abs=OF_LOSSES)


def mean_over_prompts_and_chosen(blocks: list[Block], logprobs: list[Any]) -> float:
    """Mean of -log p of every token of chosen answers and their prompts that something stands before."""
    total = count = 0.0
    for block, logprobs_T in zip(blocks, logprobs, strict=True):
        for (start, end, *prefix), preference in zip(
            block.documents.tolist(), block.columns["preference"].tolist(), strict=True
        ):
            if preference > 0:
                said = sum(logprobs_T[a:b].double().sum().item() for a, b in ((start, end), tuple(prefix)))
                total, count = total - said, count + end - start + prefix[1] - prefix[0] - 1
    return total / count
