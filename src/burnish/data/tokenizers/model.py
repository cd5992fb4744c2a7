"""The tokenizer that came with the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from burnish.data.tokenizers.base import TextTokenizer
from burnish.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ModelTokenizer(TextTokenizer):
    """The model's own tokenizer, from where its weights are."""

    type: Literal["model"] = "model"

    def open(self, model_path: str | None, revision: str = "main") -> PreTrainedTokenizerBase:
        from burnish.data.tokenizers.pretrained import open_tokenizer

        if model_path is None:
            cure = "name another: `data.tokenizer: {type: vocabulary, ...}` or `{type: pretrained, path: ...}`"
            raise ModelError("a fresh model has no tokenizer of its own", "data.tokenizer", cure)
        return open_tokenizer(model_path, revision)
