"""Second models beside a policy on a tiny model folder: what a launcher would hand over, without a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.losses.dpo import DPO
from burnish.mesh import Mesh
from burnish.model.config import ModelConfig
from burnish.model.load import load_config, load_model
from burnish.policy.agreement import Student
from burnish.policy.optimizers.adamw import AdamW
from burnish.policy.policy import Policy
from burnish.policy.second import SecondModel, Surroundings
from burnish.types import Block
from tests.preference_helpers import token_block, token_pairs

LORA = {"type": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.5}
PAIRS = token_pairs([(6, 5, 3), (2, 9, 12), (4, 1, 7), (8, 3, 3), (3, 10, 2)], 320)


def pair_rows(*, shared: bool = False) -> list[Block]:
    """Five pairs in two rows of 64."""
    return [token_block(PAIRS[:2], 64, shared=shared), token_block(PAIRS[2:], 64, shared=shared)]


def student(folder: Path, *, max_length: int = 64, **model: Any) -> Student:
    """The policy's side, with the folder's tokenizer."""
    from transformers import AutoTokenizer

    config = ModelConfig.model_validate({"path": str(folder), **model})
    return Student(config, load_config(config), AutoTokenizer.from_pretrained(folder), "a template", max_length)


def surroundings(
    of: Student,
    mesh: Mesh,
    run_dir: Path,
    blocks: Callable[[], Iterable[Block]] = pair_rows,
    *,
    resumed: bool = False,
    micro_batch_size: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> Surroundings:
    """What a launcher hands over."""

    def once() -> Iterator[Block]:
        yield from blocks()

    return Surroundings(
        student=of,
        mesh=mesh,
        micro_batch_size=micro_batch_size,
        seed=0,
        packed_length=64,
        run_dir=run_dir,
        resumed=resumed,
        blocks=once,
        say=say,
    )


def open_policy(second: SecondModel | None, around: Surroundings) -> Policy:
    """A policy with a second model beside it."""
    model = load_model(around.student.config, around.mesh, seed=0)
    opened = None if second is None else second.open(model, around)
    optimizer = AdamW().open(model.trainable_parameters())
    return Policy(
        model,
        optimizer,
        mesh=around.mesh,
        micro_batch_size=around.micro_batch_size,
        max_grad_norm=None,
        second=opened,
    )


def move(policy: Policy) -> None:
    """What a few steps would do to the trained parameters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in policy.model.trainable_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def reference_logprobs(policy: Policy, blocks: list[Block]) -> list[Tensor]:
    """The column that DPO asks."""
    return [block.columns["ref_logprobs"] for block in policy.annotated(blocks, DPO())]
