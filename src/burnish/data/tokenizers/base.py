"""What a tokenizer component is: it opens a Hugging Face tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from burnish.component import Component

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Tokenizer(Component):
    """Text to token ids. Hugging Face's fast tokenizer is the one source of truth: serving then sees the same ids."""

    def open(self, model_path: str, revision: str = "main") -> PreTrainedTokenizerBase:
        """The live tokenizer of a run on the model at `model_path` (at `revision`, on the hub). Raises ModelError."""
        raise AssertionError(f"{type(self).__name__} cannot be opened")
