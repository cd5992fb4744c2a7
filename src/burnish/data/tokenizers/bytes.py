"""Text as bytes: a tokenizer of 260 entries that needs no file, for models from scratch and for trying things out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from burnish.data.tokenizers.base import TextTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' }}{% generation %}{{ message['content'] + '<|end|>' }}"
    "{% endgeneration %}{% else %}{{ '<|user|>' + message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""A turn is its speaker, its text and an end; whoever is not the assistant speaks as the user."""


class Bytes(TextTokenizer):
    """A token for each byte of UTF-8, and four that mark turns and padding. It has a chat template."""

    type: Literal["bytes"] = "bytes"

    def open(self, model_path: str | None, revision: str = "main") -> PreTrainedTokenizerBase:
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        special = [PAD, END, USER, ASSISTANT]
        vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
        backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore[reportAttributeAccessIssue]
        backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
        tokenizer: Any = PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token=PAD, eos_token=END, additional_special_tokens=[USER, ASSISTANT]
        )
        tokenizer.chat_template = TEMPLATE
        return tokenizer
