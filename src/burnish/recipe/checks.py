"""Parts that are each right and do not fit together. Only what needs neither files, tokenizer nor model.

A check takes the recipe and yields (key path, reason, cure) for everything it finds; add one to `CHECKS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from burnish.errors import UserError
from burnish.recipe.written import KeyPath, Written, dotted

if TYPE_CHECKING:
    from burnish.recipe.schema import Recipe


class Misfit(NamedTuple):
    """What does not fit: the key a person would change, why, and to what."""

    path: KeyPath
    reason: str
    cure: str


def misfits(recipe: Recipe, written: Written) -> list[UserError]:
    """Everything in `recipe` that does not fit together."""
    found = [misfit for check in CHECKS for misfit in check(recipe)]
    return [UserError(f"{dotted(m.path)}: {m.reason}", where=written.place(m.path), cure=m.cure) for m in found]


def length_of_run(recipe: Recipe) -> Iterator[Misfit]:
    """A run has one length, and its warm-up is part of it."""
    steps, epochs = recipe.num_steps, recipe.num_epochs
    if steps is None and epochs is None:
        yield Misfit(("num_steps",), "the run has no length", "add `num_steps: 100` or `num_epochs: 1`")
    if steps is not None and epochs is not None:
        reason = f"the run has two lengths, {steps} steps and {epochs} epochs"
        yield Misfit(("num_epochs",), reason, "remove num_steps or num_epochs")
    warmup = recipe.schedule.warmup_steps
    if steps is not None and warmup > steps:
        reason = f"the warm-up of {warmup} steps is longer than the run of {steps}"
        yield Misfit(("schedule", "warmup_steps"), reason, f"at most {steps}")


def batch(recipe: Recipe) -> Iterator[Misfit]:
    """A step is a whole number of micro-batches."""
    whole, micro = recipe.global_batch_size, recipe.micro_batch_size
    if whole % micro:
        below, above = whole - whole % micro, whole - whole % micro + micro
        nearest = f"{below} or {above}" if below else f"{above}"
        divisors = [n for n in range(1, micro) if whole % n == 0]
        reason = f"{whole} packed rows a step are not a whole number of micro-batches of {micro}"
        yield Misfit(("global_batch_size",), reason, f"{nearest}; or micro_batch_size: {divisors[-1]}")


def row_length(recipe: Recipe) -> Iterator[Misfit]:
    """The longest document fits into a row."""
    row, longest = recipe.data.packing.row_length, recipe.data.max_length
    if row != "max_length" and row < longest:
        reason = f"rows of {row} tokens cannot hold a document of max_length {longest}"
        cure = f"row_length: {longest}, or data.max_length: {row}; documents are never split over rows"
        yield Misfit(("data", "packing", "row_length"), reason, cure)


def evaluation(recipe: Recipe) -> Iterator[Misfit]:
    """What is evaluated exists."""
    if recipe.eval_every is not None and not recipe.data.eval:
        yield Misfit(("eval_every",), "there is nothing to evaluate on", "add `data.eval`, or remove eval_every")


def streams(recipe: Recipe) -> Iterator[Misfit]:
    """Epochs need sources whose length is known."""
    for index, source in enumerate(recipe.data.train):
        if recipe.num_epochs is not None and getattr(source, "streaming", False):
            reason = "the length of a streamed source is unknown, so an epoch has no end to measure progress by"
            yield Misfit(("data", "train", index, "streaming"), reason, "give num_steps instead of num_epochs")


def remote_code(recipe: Recipe) -> Iterator[Misfit]:
    """Code from a hub is pinned to a commit; code in a local folder is what it is."""
    model = recipe.model
    pinned = re.fullmatch(r"[0-9a-f]{40}", model.revision) is not None
    if model.trust_remote_code and not pinned and not Path(model.path).is_dir():
        reason = f"would run whatever code {model.path} has at '{model.revision}' on the day of the run"
        cure = "set model.revision to a commit hash of 40 hex digits that you have read"
        yield Misfit(("model", "trust_remote_code"), reason, cure)


CHECKS: tuple[Callable[[Recipe], Iterator[Misfit]], ...] = (
    length_of_run,
    batch,
    row_length,
    evaluation,
    streams,
    remote_code,
)
