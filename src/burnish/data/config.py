"""The `data:` block of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, MinLen

from burnish.component import Config, Free, OneOf
from burnish.data.packing.base import Packing
from burnish.data.renderers.base import Renderer
from burnish.data.sources.base import Source
from burnish.data.tokenizers.base import Tokenizer

Sources = Annotated[list[Annotated[Source, OneOf("burnish.data.sources")]], MinLen(1)]
TOKENIZERS = OneOf("burnish.data.tokenizers", default="model")
RENDERERS = OneOf("burnish.data.renderers", default="chat")
PACKINGS = OneOf("burnish.data.packing", default="best_fit")


class DataConfig(Config):
    """From files to packed rows."""

    train: Sources
    """Mixed by weight."""
    eval: list[Annotated[Source, OneOf("burnish.data.sources")]] = []
    """Read once through at every evaluation, in order."""
    tokenizer: Annotated[Tokenizer, TOKENIZERS] = TOKENIZERS.field(Tokenizer)
    """The model's own by default."""
    renderer: Annotated[Renderer, RENDERERS] = RENDERERS.field(Renderer)
    """How rows become tokens with a loss mask."""
    max_length: Annotated[int, Ge(2)] = 2048
    """Longest document, in tokens."""
    over_length: Annotated[Literal["refuse", "truncate", "drop"], Free()] = "refuse"
    """What happens to a longer one. Every token that is cut or dropped is in the ledger. A run that was stopped by a
    long document goes on with another answer."""
    packing: Annotated[Packing, PACKINGS] = PACKINGS.field(Packing)
    """How documents are laid into rows."""
    shuffle: bool = True
    """Draw rows in a new random order each epoch, a function of the seed; false: in file order."""
    prefetch: Annotated[int, Ge(1), Free()] = 8
    """Packed rows made ahead of the training step, by a background thread; never fewer than a step takes."""
