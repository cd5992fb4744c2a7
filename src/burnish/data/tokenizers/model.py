"""The tokenizer that came with the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from burnish.data.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ModelTokenizer(Tokenizer):
    """The model's own tokenizer, from where its weights are."""

    type: Literal["model"] = "model"

    def open(self, model_path: str, revision: str = "main") -> PreTrainedTokenizerBase:
        from burnish.data.tokenizers.pretrained import open_tokenizer

        return open_tokenizer(model_path, revision)
