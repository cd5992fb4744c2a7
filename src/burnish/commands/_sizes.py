"""Estimates for `burnish check`: packing, and bytes on disk. Memory and exchanges are those of `model/plan.py`."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from burnish.model.plan import Plan
    from burnish.recipe import Recipe

NUM_PACKED = 4096
"""Documents that are packed, by length alone, to estimate fill."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


def show(num_bytes: float) -> str:
    """`1.5 GB`, in powers of 1024."""
    for unit in ("B", "KB", "MB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} GB"


def epoch(recipe: Recipe, sources: list[tuple[float, list[int]]]) -> tuple[int, float, float]:
    """(tokens of a row, share of them filled, documents in one), by packing the lengths that were seen.

    `sources` are (weight, lengths seen); lengths are drawn from each in proportion to its weight, over and over.
    """
    length = recipe.data.packing.tokens_per_row(recipe.data.max_length)
    packer = recipe.data.packing.open(length)
    total = sum(weight for weight, _ in sources)
    drawn: list[tuple[float, int]] = []
    for weight, seen in sources:
        count = max(1, round(NUM_PACKED * weight / total))
        # Spread evenly, as the mixture is: one source after the other would pack each with itself.
        drawn += [
            ((k + 0.5) / count, tokens) for k, tokens in enumerate(itertools.islice(itertools.cycle(seen), count))
        ]
    lengths = [tokens for _, tokens in sorted(drawn, key=lambda pair: pair[0])]
    num_rows = 1 + max(packer.add(n)[0] for n in lengths)
    return length, sum(lengths) / (num_rows * length), len(lengths) / num_rows


def disk_bytes(recipe: Recipe, plan: Plan) -> int:
    """Checkpoints, unless they go to a store (`keep` and the one being written: trained weights and two moments), and
    the export, which is the adapter alone where one is trained and can be told from the model: not with new tokens or
    vectors of documents."""
    new_tokens = getattr(recipe.data.tokenizer, "add_tokens", None)
    if recipe.model.adapter is None or new_tokens or recipe.model.head.makes == "embeddings":
        export = DTYPE_BYTES[recipe.model.dtype] * plan.num_parameters
    else:
        export = 4 * plan.num_trained
    num_checkpoints = recipe.checkpoint.keep + 1 if recipe.checkpoint.store is None else 0
    return num_checkpoints * plan.checkpoint_bytes + export
