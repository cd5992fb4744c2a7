"""What a renderer is: rows to token ids with a loss mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from burnish.component import Component
from burnish.types import CONVERSATIONS, RowFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from burnish.rollouts import Dialogue
    from burnish.types import Rendered, Row


class LiveRenderer(Protocol):
    """A renderer bound to its tokenizer. Pure: the same rows give the same arrays, in any batch, thread or process."""

    chat_template: str | None
    """What conversations were rendered with, to be shipped with the export; None where there is no template."""

    def render(self, rows: Sequence[Row]) -> list[Rendered]:
        """One result a row, in order, tokenised together (one `encode_batch`) because that is where the time goes."""
        ...

    def dialogue(self, multi_turn: bool = False) -> Dialogue:
        """How the same rows are asked about, for workflows that train on what the policy itself says.

        Args:
            multi_turn: something will answer the policy between its turns.

        Raises:
            DataError: that cannot be, with these rows or this chat template.
        """
        ...


class Renderer(Component):
    """How a row becomes tokens, and which of them are trained."""

    def open(self, tokenizer: PreTrainedTokenizerBase, row_format: RowFormat = CONVERSATIONS) -> LiveRenderer:
        """Proves on probe conversations that the mask can be located.

        Args:
            row_format: what every row must be, for the losses that will read it.

        Raises:
            DataError: with reason and cure, where that cannot be, or where it cannot make such rows.
        """
        raise AssertionError(f"{type(self).__name__} cannot be opened")
