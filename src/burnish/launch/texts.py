"""Tokenizer and renderer of a recipe: what every command needs that looks at rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from burnish.data.renderers.base import LiveRenderer
    from burnish.recipe import Recipe
    from burnish.types import NewTokens


class Texts(NamedTuple):
    """All that is needed to see a recipe's rows as the model will."""

    tokenizer: PreTrainedTokenizerBase
    renderer: LiveRenderer
    new_tokens: NewTokens | None
    """What the recipe adds to the model's vocabulary."""


def open_texts(recipe: Recipe) -> Texts:
    """Tokenizer, with the recipe's own tokens, and renderer. Raises UserError."""
    tokenizer = recipe.data.tokenizer.open(recipe.model.path, recipe.model.revision)
    new_tokens = recipe.data.tokenizer.extend(tokenizer)
    return Texts(tokenizer, recipe.data.renderer.open(tokenizer, recipe.row_format()), new_tokens)
