"""What a tokenizer component is: it opens a Hugging Face tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from burnish.component import Component
from burnish.data.tokenizers.added import AddTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from burnish.types import NewTokens


class Tokenizer(Component):
    """Text to token ids. Hugging Face's fast tokenizer is the one source of truth: serving then sees the same ids."""

    def open(self, model_path: str | None, revision: str = "main") -> PreTrainedTokenizerBase:
        """The live tokenizer of a run on the model at `model_path` (at `revision`, on the hub); None: a fresh model.

        Raises:
            ModelError: there is none.
        """
        raise AssertionError(f"{type(self).__name__} cannot be opened")

    def extend(self, tokenizer: PreTrainedTokenizerBase) -> NewTokens | None:
        """Adds the recipe's own tokens to what `open` returned; None: it has none. Raises DataError."""
        return None


class TextTokenizer(Tokenizer):
    """A language model's tokenizer, which new tokens can be added to."""

    add_tokens: AddTokens | None = None
    """Present: new tokens, which embedding and head get new rows for."""

    def extend(self, tokenizer: PreTrainedTokenizerBase) -> NewTokens | None:
        return None if self.add_tokens is None else self.add_tokens.extend(tokenizer)
