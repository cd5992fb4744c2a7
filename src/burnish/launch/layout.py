"""Whether a recipe's rows and model can be dealt to so many ranks, and what would fit instead.

Everything is whole numbers: rows of a step and lanes over shares of the data, heads, features and vocabulary over `tp`,
tokens of a row over `cp` and `tp`. What does not divide is told all at once, with the nearest values that do. It must
not know torch, and asks for nothing but the recipe and, where layers are cut, the model's configuration.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from burnish.errors import ModelError, RecipeError
from burnish.launch.local import slurm_ranks
from burnish.mesh_config import MeshConfig, Sizes
from burnish.workflows.on_policy import OnPolicy

if TYPE_CHECKING:
    from burnish.recipe import Recipe

KeyPath = tuple[str | int, ...]


class Misfit(NamedTuple):
    """What does not fit: the key a person would change, why, and to what."""

    path: KeyPath
    reason: str
    cure: str


def world_size(recipe: Recipe) -> int:
    """Ranks that the recipe would run on: those its launch starts, else those of this process's environment, else 1."""
    started = getattr(recipe.launch, "num_workers", None)
    environment = {**os.environ, **slurm_ranks(os.environ)}
    return int(started if started is not None else environment.get("WORLD_SIZE", "1"))


def misfits(recipe: Recipe, world_size: int, hf_config: Any = None) -> list[Misfit]:
    """All that does not divide on so many ranks.

    Args:
        hf_config: the model's configuration in transformers; None: what depends on it is passed over.
    """
    if recipe.mesh == "auto":  # chosen so that all of it fits
        return []
    try:
        sizes = recipe.mesh.sizes(world_size)
    except RecipeError as error:
        return [Misfit(("mesh",), error.problems[0].reason, error.problems[0].cure)]
    found = [*_powers(recipe, sizes), *_rows(recipe, sizes), *_tokens(recipe, sizes)]
    return [*found, *_model(recipe, sizes, hf_config)]


def nearest(value: int, step: int) -> str:
    """The multiples of `step` around `value`, as a person would type them.

    >>> nearest(10, 4), nearest(3, 4), nearest(8, 4)
    ('8 or 12', '4', '8')
    """
    below, above = value // step * step, -(-value // step) * step
    return " or ".join(str(n) for n in dict.fromkeys((below, above)) if n)


def _powers(recipe: Recipe, sizes: Sizes) -> Iterator[Misfit]:
    """A tree of sums has the same shape on every number of ranks that is a power of two, where nothing else sums."""
    if recipe.determinism != "elastic":
        return
    if sizes.tp > 1 or sizes.cp > 1:
        reason = "tp and cp cut the sums inside a layer, and rounding with them"
        yield Misfit(("determinism",), reason, "set it to fixed, or mesh.tp and mesh.cp to 1")
    if sizes.dp_replicate > 2:
        reason = "the sum over more than two copies of the model has an order of its own"
        yield Misfit(("mesh", "dp_replicate"), reason, "1 or 2 with `determinism: elastic`")
    if sizes.data & (sizes.data - 1):
        below = 1 << (sizes.data.bit_length() - 1)
        reason = f"`elastic` adds up in a binary tree, and {sizes.data} shares of the rows are no power of two"
        inner = sizes.cp * sizes.tp
        yield Misfit(
            ("determinism",), reason, f"start {below * inner} or {2 * below * inner} ranks, or set it to fixed"
        )


def _rows(recipe: Recipe, sizes: Sizes) -> Iterator[Misfit]:
    """Every share of the data takes as many whole micro-batches, from lanes of its own."""
    if sizes.data == 1 or isinstance(recipe.workflow, OnPolicy):  # which fills up every rank's rows
        return
    rows, micro, lanes = recipe.global_batch_size, recipe.micro_batch_size, recipe.data.packing.lanes
    step = sizes.data * micro
    each = f" in micro-batches of {micro}" if micro > 1 else ""
    if rows % step and not rows % micro:  # that a step is whole micro-batches is said by itself
        reason = f"{rows} packed rows a step cannot be dealt to {sizes.data} shares of the data{each}"
        yield Misfit(("global_batch_size",), reason, f"{nearest(rows, step)}, or fewer ranks, or mesh.tp or mesh.cp")
    # Elastic sums want neighbouring rows in one micro-batch, so a lane's turn is a whole one.
    turn = step if recipe.determinism == "elastic" else sizes.data
    if lanes % turn:
        reason = f"{sizes.data} shares of the data{each * (turn > sizes.data)} do not divide {lanes} lanes"
        cure = f"{nearest(lanes, turn)}; a run that has begun keeps its lanes"
        yield Misfit(("data", "packing", "lanes"), reason, cure)


def _tokens(recipe: Recipe, sizes: Sizes) -> Iterator[Misfit]:
    """A row's tokens are shared evenly by `cp`, and each part of it by `tp`, which alone would pad."""
    if sizes.cp == 1:
        return
    parts, row = sizes.cp * sizes.tp, recipe.data.packing.row_length
    length = recipe.data.max_length if row == "max_length" else row
    if length % parts:
        path = ("data", "max_length") if row == "max_length" else ("data", "packing", "row_length")
        axes = " x ".join(f"{name} {size}" for name, size in (("cp", sizes.cp), ("tp", sizes.tp)) if size > 1)
        reason = f"rows of {length} tokens cannot be shared evenly by the {parts} ranks of {axes}"
        yield Misfit(path, reason, nearest(length, parts))
    if any(part.makes != "tokens" for part in recipe.model.head.parts().values()):
        reason = "its heads read whole documents, and `mesh.cp` cuts them"
        yield Misfit(("model", "head"), reason, "mesh.cp: 1, or the language model's own head alone")
    if sizes.cp > 1 and recipe.row_format().kind == "preference" and getattr(recipe.data.renderer, "share_prompt", 0):
        reason = "a prompt that two answers share cannot be cut over ranks by `mesh.cp`"
        yield Misfit(("data", "renderer", "share_prompt"), reason, "false: each answer then has its own copy")


def _model(recipe: Recipe, sizes: Sizes, hf_config: Any) -> Iterator[Misfit]:
    """Tensor parallel gives every rank as many heads, features and rows of the vocabulary."""
    if sizes.tp == 1:
        return
    if recipe.model.compile is not None:
        reason = "torch.compile cannot take the exchanges of tensor parallel into a layer's graph"
        yield Misfit(("model", "compile"), reason, "leave it out, or mesh.tp: 1")
    if hf_config is None:
        return
    from burnish.model.tensor_plan import require_divisible

    rows, pad = hf_config.get_text_config().vocab_size, recipe.model.pad_vocab_to
    try:
        require_divisible(hf_config, rows + -rows % pad, sizes)
    except ModelError as error:
        yield Misfit(("mesh", "tp"), error.reason, error.cure)


def with_mesh(recipe: Recipe, sizes: Sizes) -> Recipe:
    """The recipe laid out so."""
    mesh = MeshConfig(dp_replicate=sizes.dp_replicate, dp_shard=sizes.dp_shard, tp=sizes.tp, cp=sizes.cp)
    return recipe.model_copy(update={"mesh": mesh})
