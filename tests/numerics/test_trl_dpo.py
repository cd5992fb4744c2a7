"""DPO and its variants beside TRL's DPOTrainer, step by step.

Conversations are the one place where the two train on other tokens; see the last test.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from burnish.losses.apo_down import APODown
from burnish.losses.apo_zero import APOZero
from burnish.losses.base import Loss
from burnish.losses.dpo import DPO
from burnish.losses.hinge import Hinge
from burnish.losses.ipo import IPO
from burnish.losses.robust import Robust
from burnish.losses.sum import Sum
from burnish.policy.second import Reference
from tests.second_helpers import move
from tests.trl_helpers import (
    BATCH,
    STEPS,
    Trajectory,
    assert_together,
    burnish_policy,
    metric_apart,
    pair_rows,
    rendered,
    steps_of,
    with_trl,
    write_model,
)

WITH_NLL = Sum.model_validate({"terms": [{"loss": {"type": "dpo"}}, {"weight": 0.3, "loss": {"type": "nll"}}]})
CASES: dict[str, tuple[int, Loss, dict[str, Any]]] = {
    "sigmoid": (STEPS, DPO(beta=0.2), {"beta": 0.2}),
    "sigmoid_norm": (3, DPO(beta=2.0, length_normalised=True), {"beta": 2.0}),
    "hinge": (3, Hinge(), {}),
    "ipo": (3, IPO(), {}),
    "robust": (3, Robust(label_smoothing=0.1), {"label_smoothing": 0.1}),
    "apo_zero": (3, APOZero(), {}),
    "apo_down": (3, APODown(), {}),
    "sigmoid and sft": (3, WITH_NLL, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}),
}
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
OF_A_MEAN = ("sigmoid_norm", "ipo")
"""Whose rewards are of means over an answer's tokens here, as the loss is, and of sums in TRL's metrics."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def trl_dpo(folder: Path, rows: list[dict[str, Any]], output_dir: Path, **arguments: Any) -> Trajectory:
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    return with_trl(DPOTrainer, DPOConfig, folder, rows, output_dir, **arguments)


@pytest.mark.parametrize("name", CASES)
def test_full_fine_tuning_with_a_frozen_reference(name: str, folder: Path, tmp_path: Path) -> None:
    steps, loss, config = CASES[name]
    rows = pair_rows(steps * BATCH)
    groups = rendered(folder, rows, "preference")
    assert {len(group.samples) for group in groups} == {2, 3}  # some prompts are shared, some are not
    with burnish_policy(folder, tmp_path, second=Reference()) as policy:
        ours = steps_of(policy, groups, loss)
    theirs = trl_dpo(folder, rows, tmp_path, **{"loss_type": name} | config)
    assert_together(ours, theirs)
    rewards = () if name in OF_A_MEAN else REWARDS
    for metric in (*rewards, "logps/chosen", "logps/rejected"):
        assert metric_apart(metric, ours, theirs) < 1e-4, metric


def test_lora_whose_reference_is_the_adapter_off(folder: Path, tmp_path: Path) -> None:
    """The adapter does not begin at zero: the first loss, 0.69 were the reference a copy of it, tells."""
    from peft import LoraConfig, set_peft_model_state_dict

    groups = rendered(folder, pair_rows(), "preference")
    adapter = {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    with burnish_policy(folder, tmp_path, second=Reference(), adapter=adapter) as policy:
        move(policy)
        ours = steps_of(policy, groups, DPO())
    theirs = trl_dpo(
        folder,
        pair_rows(),
        tmp_path,
        trainer={"peft_config": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")},
        begin=lambda trainer: set_peft_model_state_dict(trainer.model, ours.first_weights),
    )
    assert_together(ours, theirs)
    assert abs(ours.losses[0] - 0.6931) > 0.01


def test_trl_also_trains_what_the_template_writes_behind_an_answer(tiny_model: Path, tmp_path: Path) -> None:
    """A ChatML turn ends `<|im_end|>` and a line break: the model says the first, the template adds the second."""
    rows = [
        {
            "prompt": [{"role": "user", "content": "turn around: red cat"}],
            "chosen": [{"role": "assistant", "content": "cat red"}],
            "rejected": [{"role": "assistant", "content": "red cat moon"}],
        }
    ] * BATCH
    prepared: list[dict[str, Any]] = []
    trl_dpo(tiny_model, rows, tmp_path, begin=lambda trainer: prepared.append(trainer.train_dataset[0]))
    line_break = ids(tiny_model, "\n")
    (group,) = rendered(tiny_model, rows[:1], "preference")
    *_, chosen, rejected = group.samples
    for name, sample in (("chosen_ids", chosen), ("rejected_ids", rejected)):
        assert prepared[0][name] == [*sample.token_ids[sample.loss_mask].tolist(), *line_break]
        assert sample.token_ids[-1:].tolist() == line_break and not sample.loss_mask[-1]


def ids(folder: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)(text).input_ids
