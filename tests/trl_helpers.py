"""The same steps by TRL's own trainers and by Burnish's policy: same weights, rows, batches and optimizer, in float32.

TRL pads a batch; here its groups are packed into rows of `ROW_LENGTH` tokens, in the same order, prompts shared where
the renderer shares them, two rows in a micro-batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.data.packing.layout import layout
from burnish.data.renderers.chat import Chat
from burnish.data.tokenizers.pretrained import open_tokenizer
from burnish.losses.base import Loss
from burnish.mesh import open_mesh
from burnish.model.adapters.weights import adapter_tensors
from burnish.model.load import load_model
from burnish.model.shards import gathered
from burnish.policy.optimizers.adamw import AdamW
from burnish.policy.policy import Policy
from burnish.policy.second import SecondModel
from burnish.types import Block, Group, Row, RowFormat, RowKind
from tests import tiny_run
from tests.second_helpers import student, surroundings
from tests.tiny_models import tiny_model

STEPS, BATCH = 8, 4
ROW_LENGTH, DOCUMENTS, MICRO_BATCH = 128, 12, 2
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-3, 0.1, 1.0
OF_LOSSES, OF_WEIGHTS = 2e-5, 1e-4
"""Differences that are allowed of a step's loss and of a weight at the end. AdamW divides a gradient by its own size: a
weight whose gradients are rounding errors may move by a learning rate in one of the two and not in the other."""


@dataclass
class Trajectory:
    """What a trainer said of each step."""

    losses: list[float] = field(default_factory=list)
    """As they are minimised, unrounded."""
    metrics: list[dict[str, float]] = field(default_factory=list)
    first_weights: dict[str, Tensor] = field(default_factory=dict)
    """What trains, under the names of its file, before the first step."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """The same after the last one."""


def write_model(folder: Path, *, seed: int = 0) -> Path:
    """A two-layer Llama whose attention scores exceed 1, with a tokenizer without a chat template: rows are strings."""
    tiny_model("llama", seed, vocab_size=320).save_pretrained(folder)
    tiny_run.write_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    return folder


def said(rng: random.Random, longest: int) -> str:
    """1 to `longest` words, each behind a space, so that no token spans prompt and answer."""
    return "".join(f" {word}" for word in rng.choices(tiny_run.WORDS, k=rng.randint(1, longest)))


def pair_rows(count: int = STEPS * BATCH) -> list[dict[str, Any]]:
    """Prompts of 1 to 24 words, some shared by the renderer and some not, with uneven answers."""
    rng = random.Random(0)
    return [{"prompt": said(rng, 24), "chosen": said(rng, 9), "rejected": said(rng, 9)} for _ in range(count)]


def answer_rows(count: int = STEPS * BATCH) -> list[dict[str, Any]]:
    """Answers marked good or bad, in no regular order; never all of a batch of one kind."""
    rng = random.Random(1)
    labels = [label for _ in range(count // BATCH) for label in rng.sample([True, True, False, rng.random() < 0.5], 4)]
    return [{"prompt": said(rng, 9), "completion": said(rng, 9), "label": label} for label in labels]


@cache
def renderer(folder: Path, kind: RowKind) -> Any:
    return Chat().open(open_tokenizer(str(folder)), RowFormat(kind))


def rendered(folder: Path, rows: Sequence[dict[str, Any]], kind: RowKind) -> list[Group]:
    found = renderer(folder, kind).render([Row(row, f"rows:{i}") for i, row in enumerate(rows, 1)])
    assert all(one.group is not None for one in found)
    return [one.group for one in found]


def packed(groups: Sequence[Group]) -> list[Block]:
    """Groups in order, a new row where the next one does not fit."""
    rows: list[list[Group]] = [[]]
    for group in groups:
        tokens, documents = sum(map(len, rows[-1])), sum(len(held.samples) for held in rows[-1])
        if tokens + len(group) > ROW_LENGTH or documents + len(group.samples) > DOCUMENTS:
            rows.append([])
        rows[-1].append(group)
    return [layout(row, ROW_LENGTH, DOCUMENTS) for row in rows]


@contextmanager
def burnish_policy(
    folder: Path, run_dir: Path, *, second: SecondModel | None = None, adapter: dict[str, Any] | None = None
) -> Iterator[Policy]:
    """What a launcher opens, without a recipe."""
    of = student(folder, **({} if adapter is None else {"adapter": adapter}))
    with open_mesh("cpu") as mesh:
        around = surroundings(of, mesh, run_dir, micro_batch_size=MICRO_BATCH)
        model = load_model(of.config, mesh, seed=0)
        optimizer = AdamW(learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY).open(model.trainable_parameters())
        yield Policy(
            model,
            optimizer,
            mesh=mesh,
            micro_batch_size=MICRO_BATCH,
            max_grad_norm=MAX_GRAD_NORM,
            second=None if second is None else second.open(model, around),
        )


def steps_of(policy: Policy, groups: Sequence[Group], loss: Loss) -> Trajectory:
    """A step of Burnish's for each `BATCH` groups."""
    found = Trajectory(first_weights=_weights(policy))
    for start in range(0, len(groups), BATCH):
        metrics = policy.forward_backward(packed(groups[start : start + BATCH]), loss)
        policy.optim_step(LEARNING_RATE)
        found.metrics.append({name: total / (count or 1.0) for name, (total, count) in metrics.items()})
        found.losses.append(found.metrics[-1]["loss"])
    found.weights = _weights(policy)
    return found


def _weights(policy: Policy) -> dict[str, Tensor]:
    model = policy.model
    tensors = dict(model.hf_tensors(merge=False)) if model.adapter is None else gathered(adapter_tensors(model))
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def with_trl(
    trainer_type: Any,
    config_type: Any,
    folder: Path,
    rows: Sequence[dict[str, Any]],
    output_dir: Path,
    *,
    begin: Callable[[Any], None] = lambda _: None,
    trainer: dict[str, Any] | None = None,
    **config: Any,
) -> Trajectory:
    """A step of TRL's for each `BATCH` rows, unless `config` says otherwise.

    Args:
        begin: called with the trainer before its first step.
        trainer: further arguments of the trainer, `config` those of its configuration.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = Trajectory()

    class Watched(trainer_type):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            found.losses.append((loss[0] if isinstance(loss, tuple) else loss).item())
            return loss

    arguments = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": BATCH,
        "max_steps": len(rows) // BATCH,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": WEIGHT_DECAY,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": MAX_GRAD_NORM,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    running = Watched(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=config_type(**arguments | config),
        train_dataset=Dataset.from_list(list(rows)),
        # Its experimental trainers put a `bos_token` before a prompt even where the tokenizer itself puts none.
        processing_class=AutoTokenizer.from_pretrained(folder, bos_token=None),
        **(trainer or {}),
    )
    begin(running)
    running.train()
    found.metrics = [entry for entry in running.state.log_history if "loss" in entry]
    found.weights = state_of(running.model)
    return found


def state_of(model: Any) -> dict[str, Tensor]:
    """Copies of a plain model's weights, or of its adapter's where PEFT put one on it."""
    from peft import PeftModel, get_peft_model_state_dict

    state = get_peft_model_state_dict(model) if isinstance(model, PeftModel) else model.state_dict()
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def assert_together(ours: Trajectory, theirs: Trajectory) -> None:
    """Both said the same at every step and ended in one place, away from where they began."""
    assert ours.weights.keys() == theirs.weights.keys()
    moved, weight = _largest(ours.first_weights, ours.weights), _largest(ours.weights, theirs.weights)
    loss = max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True))
    print(f"{len(ours.losses)} steps: losses differ by {loss:.1e}, weights by {weight:.1e} of {moved:.1e} moved")
    assert moved > LEARNING_RATE
    assert loss < OF_LOSSES and weight < OF_WEIGHTS


def metric_apart(name: str, ours: Trajectory, theirs: Trajectory) -> float:
    """Largest difference of a step's metric, of the same name in both."""
    return max(abs(a[name] - b[name]) for a, b in zip(ours.metrics, theirs.metrics, strict=True))


def _largest(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    return max((some[name] - others[name]).abs().max().item() for name in some)
