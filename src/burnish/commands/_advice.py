"""What `burnish check` warns of: recipes that run, and teach less than their author thinks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from burnish.data.config import DataConfig
    from burnish.recipe import Recipe


def short_rows(data: DataConfig, num_rows: int, beyond_row: Sequence[int]) -> Iterator[tuple[str, str]]:
    """(what, cure) where groups of documents that each fit `max_length` are cut or dropped for the row's sake.

    Args:
        num_rows: rows that were looked at.
        beyond_row: tokens, each document's at most `max_length`, of groups cut or dropped since a row is shorter.
    """
    if beyond_row:
        packed = f"a packed row of {data.packing.tokens_per_row(data.max_length):,} tokens"
        which = f"the documents of {len(beyond_row):,} of {num_rows:,} rows, up to {max(beyond_row):,} tokens,"
        cure = f"data.packing.row_length: {max(2 * data.max_length, *beyond_row)}"
        yield f"{which} exceed {packed} together: `over_length: {data.over_length}` cuts or drops them", cure


def small_step(recipe: Recipe, documents: float) -> Iterator[tuple[str, str]]:
    """(what, cure) where a loss compares the documents of a step, and there is about one."""
    if documents >= 2:
        return
    if recipe.workflow.type == "embedding":
        text = f"a step holds about {documents:.1f} queries: few documents that each is to be told apart from"
        yield text, "raise global_batch_size"
    if any("kto_kl" in loss.asks for loss in recipe.workflow.losses()):
        text = f"a step holds about {documents:.1f} answers; of one alone the KL estimate of `kto` is always 0"
        yield text, "raise global_batch_size"
