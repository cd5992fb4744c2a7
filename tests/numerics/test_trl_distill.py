"""Distillation beside TRL's GKDTrainer on given completions (`lmbda` 0), step by step.

TRL's `beta` of 0 is the forward KL, of 1 the reverse. The trainer compares at a temperature of 1, whatever its own is
set to: that one is for sampling.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.losses.kd import KD
from burnish.policy.second import Teacher
from burnish.types import Group
from tests.trl_helpers import (
    BATCH,
    STEPS,
    answer_rows,
    assert_together,
    burnish_policy,
    packed,
    rendered,
    steps_of,
    with_trl,
    write_model,
)

KINDS = {
    "forward": (0.0, KD(kind="forward")),
    "jsd": (0.3, KD(kind="jsd", beta=0.3)),
    "reverse": (1.0, KD(kind="reverse")),
}


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL warns of its experimental part at import."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("teacher"), seed=1)


def completions(count: int) -> list[dict[str, str]]:
    return [{"prompt": row["prompt"], "completion": row["completion"]} for row in answer_rows(count)]


def causal_lm(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_trls(kind: str, folder: Path, teacher: Path, tmp_path: Path) -> None:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    beta, loss = KINDS[kind]
    rows = completions(STEPS * BATCH)
    groups = rendered(folder, rows, "conversation")
    with burnish_policy(folder, tmp_path, second=Teacher(path=str(teacher))) as policy:
        ours = steps_of(policy, groups, loss)
    tokens = [
        {
            "prompt": row["prompt"],
            "input_ids": group.samples[0].token_ids.tolist(),
            "completion_mask": group.samples[0].loss_mask.astype(int).tolist(),
        }
        for row, group in zip(rows, groups, strict=True)
    ]
    theirs = with_trl(
        GKDTrainer,
        GKDConfig,
        folder,
        tokens,
        tmp_path,
        trainer={"teacher_model": causal_lm(teacher)},
        lmbda=0.0,
        beta=beta,
        temperature=3.0,
    )
    assert_together(ours, theirs)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_divergence_is_trls_and_the_loss_that_times_the_square_of_the_temperature(
    kind: str, temperature: float, folder: Path, teacher: Path, tmp_path: Path
) -> None:
    """TRL's function leaves the factor out."""
    from trl.experimental.gkd import GKDTrainer

    beta, loss = KINDS[kind]
    groups = rendered(folder, completions(2 * BATCH), "conversation")
    with burnish_policy(folder, tmp_path, second=Teacher(path=str(teacher))) as policy:
        metrics = policy.evaluate(packed(groups), loss.model_copy(update={"temperature": temperature}))
    found = {name: total / count for name, (total, count) in metrics.items()}
    p, q = (logits(causal_lm(path), groups) for path in (folder, teacher))
    theirs = GKDTrainer.generalized_jsd_loss(p, q, beta=beta, temperature=temperature).item()
    assert found["divergence"] == pytest.approx(theirs, rel=2e-6)
    assert found["loss"] == pytest.approx(temperature**2 * theirs, rel=2e-6)


@torch.no_grad()
def logits(model: Any, groups: list[Group]) -> Tensor:
    """[trained tokens, V]: what each was drawn from, one document at a time."""
    samples = [group.samples[0] for group in groups]
    return torch.cat(
        [
            model(input_ids=torch.from_numpy(sample.token_ids[None]).long()).logits[0, :-1][
                torch.from_numpy(sample.loss_mask[1:])
            ]
            for sample in samples
        ]
    )
