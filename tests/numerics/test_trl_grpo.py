"""Two updates on one set of rollouts beside TRL's GRPOTrainer: losses and gradients.

TRL is handed the completions by its own `rollout_func`; between the two updates both step by plain gradient descent, so
far that ratios leave their bounds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.advantages.base import Advantage, Scored
from burnish.advantages.group_mean import GroupMean
from burnish.advantages.group_norm import GroupNorm
from burnish.component import OneOf
from burnish.losses.rl.base import PolicyLoss
from burnish.policy.second import Reference
from tests.policy_loss_helpers import Episode, row
from tests.policy_model_helpers import gradients, largest_difference
from tests.trl_helpers import burnish_policy, with_trl, write_model

LEARNING_RATE, LONGEST = 0.01, 9
LENGTHS = [[6, 2, 9, 1], [3, 7, 4, 5]]
REWARDS = [[1.0, 0.0, 0.25, 0.5], [0.0, 1.0, 1.0, 0.0]]
PROMPTS = [[5, 40, 41, 7, 300], [9, 11, 210]]


@dataclass
class Said:
    """Of each update."""

    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Drawn:
    """A model, and what was drawn for each prompt."""

    folder: Path
    answers: list[list[list[int]]]
    logprobs: list[list[list[float]]]
    """Of their tokens, as an engine of other numerics says them: 0.3 from the model's."""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    from transformers import AutoModelForCausalLM

    folder = write_model(tmp_path_factory.mktemp("model"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    answers = [[torch.randint(3, 320, (n,), generator=generator).tolist() for n in group] for group in LENGTHS]
    logprobs: list[list[list[float]]] = []
    for prompt, group in zip(PROMPTS, answers, strict=True):
        logprobs.append([])
        for answer in group:
            ids = torch.tensor([prompt + answer])
            with torch.no_grad():
                said = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            own = said.gather(1, torch.tensor(answer)[:, None]).squeeze(1)
            logprobs[-1].append((own + 0.3 * torch.randn(len(answer), generator=generator)).tolist())
    return Drawn(folder, answers, logprobs)


def trl_grpo(drawn: Drawn, output_dir: Path, *, corrected: bool, **config: Any) -> Said:
    """What TRL says; `corrected` with its correction for a vLLM that drew the completions."""
    from transformers import TrainerCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    said = Said()

    class Watcher(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            said.gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})

    class Engine:
        def sync_weights(self) -> None:
            """There is nothing behind it: the completions are given."""

    def rollouts(prompts: list[str], _: Any) -> dict[str, Any]:
        asked = [int(prompt) for prompt in dict.fromkeys(prompts)]
        return {
            "prompt_ids": [PROMPTS[int(prompt)] for prompt in prompts],
            "completion_ids": [ids for prompt in asked for ids in drawn.answers[prompt]],
            "logprobs": [values for prompt in asked for values in drawn.logprobs[prompt]],
        }

    def rewards(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        answers = [tuple(ids) for group in drawn.answers for ids in group]
        by_answer = dict(zip(answers, [reward for group in REWARDS for reward in group], strict=True))
        return [by_answer[tuple(ids)] for ids in completion_ids]

    def begin(trainer: Any) -> None:
        trainer.add_callback(Watcher())
        if corrected:
            trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, Engine(), -1

    trajectory = with_trl(
        GRPOTrainer,
        GRPOConfig,
        drawn.folder,
        [{"prompt": "0"}, {"prompt": "1"}],
        output_dir,
        begin=begin,
        trainer={"reward_funcs": rewards, "rollout_func": rollouts},
        **{
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": LONGEST,
            "num_iterations": 2,
            "max_steps": 2,
            "shuffle_dataset": False,
            "optim": "sgd",
            "learning_rate": LEARNING_RATE,
            "weight_decay": 0.0,
            "max_grad_norm": 0.0,
        }
        | config,
    )
    parts = len(trajectory.losses) // 2  # micro-batches of an update, whose losses TRL has divided by their number
    said.losses = [sum(trajectory.losses[:parts]), sum(trajectory.losses[parts:])]
    said.metrics = trajectory.metrics
    return said


def ours(drawn: Drawn, run_dir: Path, loss: PolicyLoss, advantage: Advantage) -> Said:
    """What Burnish says: prompts shared, two rows, one in a micro-batch."""
    said, second = Said(), Reference() if loss.asks else None
    flat = torch.tensor([length for lengths in LENGTHS for length in lengths])
    rewards = torch.tensor([reward for group in REWARDS for reward in group], dtype=torch.float64)
    advantages = iter(advantage(Scored(rewards, torch.tensor([0] * 4 + [1] * 4), flat)).advantages.split(flat.tolist()))
    groups = [
        [
            Episode(
                prompt, ids, [True] * len(ids), {"rollout_logprobs": values, "advantages": next(advantages).tolist()}
            )
            for ids, values in zip(answers, logprobs, strict=True)
        ]
        for prompt, answers, logprobs in zip(PROMPTS, drawn.answers, drawn.logprobs, strict=True)
    ]
    blocks = [row([group], shared=True) for group in groups]
    with burnish_policy(drawn.folder, run_dir, second=second) as policy:
        policy.micro_batch_size = 1
        parameters = dict(policy.model.trainable_parameters())
        for block, old in zip(blocks, policy.logprobs(blocks, trained_only=True), strict=True):
            block.columns["old_logprobs"] = old
        for _ in range(2):
            metrics = policy.forward_backward(blocks, loss)
            said.metrics.append({name: total / (count or 1.0) for name, (total, count) in metrics.items()})
            said.losses.append(said.metrics[-1]["loss"])
            said.gradients.append(gradients(policy.model))
            with torch.no_grad():
                for name, gradient in said.gradients[-1].items():
                    parameters[name].sub_(LEARNING_RATE * gradient)
    return said


CASES: dict[str, tuple[dict[str, Any], Advantage, dict[str, Any]]] = {
    "grpo": (
        {"type": "ppo_clip", "aggregation": "sequence", "kl_coef": 0.1},
        GroupNorm(),
        {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},
    ),
    "grpo, unbiased kl, two micro-batches": (
        {"type": "ppo_clip", "aggregation": "sequence", "kl_coef": 0.1, "kl_unbiased": True},
        GroupNorm(),
        {"loss_type": "grpo", "beta": 0.1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    ),
    "bnpo, entropy, token_truncate": (
        {
            "type": "ppo_clip",
            "entropy_coef": 0.02,
            "correction": {"type": "token_truncated", "max_weight": 1.5},
        },
        GroupNorm(),
        {
            "loss_type": "bnpo",
            "entropy_coef": 0.02,
            "vllm_importance_sampling_mode": "token_truncate",
            "vllm_importance_sampling_clip_max": 1.5,
        },
    ),
    "dapo, two micro-batches": (
        {"type": "ppo_clip", "clip_high": 0.28},
        GroupNorm(),
        {
            "loss_type": "dapo",
            "epsilon_high": 0.28,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
        },
    ),
    "dr_grpo": (
        {"type": "ppo_clip", "aggregation": "constant", "constant_length": LONGEST},
        GroupMean(),
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
    ),
    "cispo, sequence_mask": (
        {"type": "cispo", "max_ratio": 1.1, "correction": {"type": "sequence_mask", "max_ratio": 2.0}},
        GroupNorm(),
        {
            "loss_type": "cispo",
            "epsilon_high": 1.1,
            "vllm_importance_sampling_mode": "sequence_mask",
            "vllm_importance_sampling_clip_max": 2.0,
        },
    ),
    "gspo": (
        {"type": "gspo", "clip_low": 0.2, "clip_high": 0.2},
        GroupNorm(),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.2},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_of_two_updates(
    case: str, drawn: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    fields, advantage, config = CASES[case]
    loss = OneOf("burnish.losses.rl").find(PolicyLoss, fields["type"]).model_validate(fields)
    found = ours(drawn, tmp_path, loss, advantage)
    expected = trl_grpo(drawn, tmp_path, corrected=loss.correction is not None, **config)
    for update in range(2):
        theirs = expected.gradients[update]
        largest = max(gradient.abs().max() for gradient in theirs.values())
        of_loss = abs(found.losses[update] - expected.losses[update])
        apart = {name: (found.gradients[update][name] - theirs[name]).abs().max() / largest for name in theirs}
        print(f"{case}, update {update}: losses differ by {of_loss:.1e}, gradients by {max(apart.values()):.1e}")
        assert of_loss < 1e-5 and max(apart.values()) < 1e-5
        assert largest_difference(found.gradients[update], theirs)[0] < 1e-4  # the smallest matrices' too
    clipped = found.metrics[1]["clip_fraction_low"] + found.metrics[1]["clip_fraction_high"]
    assert 0.0 < clipped < 0.95  # the second update is of both kinds of tokens
