"""KTO beside TRL's KTOTrainer: losses and the estimate of the KL, step by step, and over what each takes the estimate.

Both pair prompt i with completion i - 1, the first with the last one: the answers must come in the same order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from burnish.losses.kto import KTO
from burnish.policy.second import Reference
from tests.trl_helpers import (
    BATCH,
    OF_LOSSES,
    Trajectory,
    answer_rows,
    assert_together,
    burnish_policy,
    metric_apart,
    packed,
    rendered,
    steps_of,
    with_trl,
    write_model,
)

OTHER = 9
"""Seed of another model. The KL from it is estimated as 0 and 7.6 in the halves, as 2.8 in the whole."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def trl_kto(folder: Path, rows: list[dict[str, Any]], output_dir: Path, **arguments: Any) -> Trajectory:
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.kto_trainer import KTOTrainer

    return with_trl(KTOTrainer, KTOConfig, folder, rows, output_dir, **arguments)


def test_losses_and_kl_are_trls(folder: Path, tmp_path: Path) -> None:
    rows = answer_rows()
    with burnish_policy(folder, tmp_path, second=Reference()) as policy:
        ours = steps_of(policy, rendered(folder, rows, "unpaired"), KTO(beta=0.2, desirable_weight=1.5))
    theirs = trl_kto(folder, rows, tmp_path, beta=0.2, desirable_weight=1.5)
    assert_together(ours, theirs)
    kl = [metrics["kl"] for metrics in ours.metrics]
    assert kl[0] == 0.0 and max(kl) > 0.1  # clamped at some steps, and not at others
    for metric in ("kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
        assert metric_apart(metric, ours, theirs) < 1e-4, metric


def test_trl_estimates_the_kl_by_micro_batch_and_burnish_over_the_step(folder: Path, tmp_path: Path) -> None:
    """Eight answers in one step, against a reference that differs from the start.

    One micro-batch of 8 is the same in both. TRL's 2 micro-batches of 4 say what two steps of 4 say, on average: other
    mismatched pairs, and a KL that is clamped at 0 in each half.
    """
    from transformers import AutoModelForCausalLM

    other, rows, loss = write_model(tmp_path / "other", seed=OTHER), answer_rows(2 * BATCH), KTO()
    groups = rendered(folder, rows, "unpaired")

    def theirs(size: int, accumulated: int) -> Trajectory:
        return trl_kto(
            folder,
            rows,
            tmp_path,
            trainer={"ref_model": AutoModelForCausalLM.from_pretrained(other)},
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            max_steps=1,
        )

    with burnish_policy(folder, tmp_path, second=Reference(path=str(other))) as policy:
        first, last, both = (
            {name: total / count for name, (total, count) in policy.forward_backward(packed(part), loss).items()}
            for part in (groups[:BATCH], groups[BATCH:], groups)
        )
    whole, halves = theirs(2 * BATCH, 1), theirs(BATCH, 2)
    assert whole.losses == [pytest.approx(both["loss"], abs=OF_LOSSES)]
    assert whole.metrics[0]["kl"] == pytest.approx(both["kl"], abs=1e-4)
    assert halves.losses == pytest.approx([first["loss"], last["loss"]], abs=OF_LOSSES)
    assert halves.metrics[0]["kl"] == pytest.approx((first["kl"] + last["kl"]) / 2, abs=1e-4)
    assert abs(both["kl"] - halves.metrics[0]["kl"]) > 0.1
    assert abs(both["loss"] - sum(halves.losses) / 2) > 100 * OF_LOSSES
