"""Ten steps of Burnish and of TRL's RewardTrainer on the same weights, pairs and batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from burnish.data.packing.layout import layout
from burnish.losses.bradley_terry import BradleyTerry
from burnish.mesh import open_mesh
from burnish.model.config import ModelConfig
from burnish.model.export_scores import classifier_tensors
from burnish.model.heads.attach import sequence_classifier
from burnish.model.parallel import prepare
from burnish.model.policy_model import PolicyModel
from burnish.model.shards import gathered
from burnish.policy.optimizers.adamw import AdamW
from burnish.policy.policy import Policy
from burnish.types import Group, Sample
from tests import tiny_run
from tests.policy_model_helpers import random_documents
from tests.tiny_models import tiny_model

STEPS, PAIRS, VOCABULARY = 10, 4, 320
# Two steps' pairs, five times over, so that there is something to learn. Without token 0, which pads: TRL's model would
# read the score of the token before it.
LENGTHS = [3 + 7 * i % 23 for i in range(4 * PAIRS)]
ANSWERS = [[token + 1 for token in ids] for ids in random_documents(LENGTHS, VOCABULARY - 1, seed=4)] * (STEPS // 2)
MARGINS = [0.25 * (i % 3) for i in range(2 * PAIRS)] * (STEPS // 2)
CENTERING, LEARNING_RATE = 0.05, 3e-3


def ours(policy: Policy) -> list[float]:
    """Loss of each step; a row holds two pairs, a step two rows."""
    groups = []
    for index, margin in enumerate(MARGINS):
        columns = {"weight": np.array(1.0, np.float32), "margin": np.array(margin, np.float32)}
        samples = [
            Sample(
                np.array(ids, np.int32),
                np.arange(len(ids)) > 0,
                "here",
                columns | {"preference": np.array(sign, np.float32)},
            )
            for ids, sign in zip(ANSWERS[2 * index : 2 * index + 2], (1.0, -1.0), strict=True)
        ]
        groups.append(Group(tuple(samples)))
    losses = []
    for step in range(STEPS):
        batch = groups[step * PAIRS : (step + 1) * PAIRS]
        blocks = [layout(batch[:2], 128, 8), layout(batch[2:], 128, 8)]
        total, count = policy.forward_backward(blocks, BradleyTerry(centering=CENTERING))["loss"]
        policy.optim_step(LEARNING_RATE)
        losses.append(total / count)
    return losses


def theirs(classifier: Any, folder: Path) -> list[float]:
    """The losses that TRL logs."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    tiny_run.write_tokenizer(folder)
    config = RewardConfig(
        output_dir=str(folder),
        per_device_train_batch_size=PAIRS,
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta2=0.999,
        max_grad_norm=1.0,
        logging_steps=1,
        center_rewards_coefficient=CENTERING,
        train_sampling_strategy="sequential",
        max_length=None,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = {"chosen_ids": ANSWERS[::2], "rejected_ids": ANSWERS[1::2], "margin": MARGINS}
    trainer = RewardTrainer(
        model=classifier,
        args=config,
        train_dataset=Dataset.from_dict(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("default")  # of TRL's imports and of the trainer
def test_losses_follow_trls_reward_trainer(tmp_path: Path) -> None:
    with open_mesh("cpu") as mesh:
        model = PolicyModel.from_hf(tiny_model("llama", vocab_size=VOCABULARY))
        config = ModelConfig.model_validate({"path": "tiny", "head": {"type": "scalar"}})
        prepare(model, config, mesh, seed=0)
        model.hf_config.num_labels = 1
        classifier = sequence_classifier(model.hf_config)._from_config(model.hf_config, attn_implementation="eager")
        classifier.load_state_dict(gathered(classifier_tensors(model)))
        optimizer = AdamW(learning_rate=LEARNING_RATE, weight_decay=0.0).open(model.trainable_parameters())
        policy = Policy(model, optimizer, mesh=mesh, micro_batch_size=1, max_grad_norm=1.0)
        expected = theirs(classifier, tmp_path)
        found = ours(policy)
    assert len(expected) == STEPS
    assert found[0] > 0.6 and found[-1] < 0.3
    difference = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    print(f"largest difference of a loss over {STEPS} steps: {difference:.1e}")
    assert difference < 1e-4
