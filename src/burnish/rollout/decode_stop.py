"""Texts that end a turn: found in what the last tokens say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from burnish.errors import ModelError


class StopTexts:
    """Looks for texts at the end of sampled tokens, with the tokenizer of a folder, which is read when it is needed."""

    def __init__(self, tokenizer_path: str) -> None:
        self._path = tokenizer_path
        self._tokenizer: Any = None

    def require(self, texts: Sequence[str]) -> None:
        """Raises ModelError where there are `texts` to look for, and no tokenizer."""
        if not texts or self._tokenizer is not None:
            return
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(self._path)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"no tokenizer to find texts with: {str(error).splitlines()[0]}",
                where="rollout.sampling.stop",
                cure="end turns by `stop_token_ids`",
            ) from error

    def ended(self, token_ids: Sequence[int], texts: Sequence[str]) -> bool:
        """Whether one of `texts` ends within the last token of a turn.

        A character is four bytes at most and a token one at least, so a text of n characters and the token that goes
        beyond its end lie in the last 4 n + 1 tokens.
        """
        longest = max(map(len, texts))
        said = self._tokenizer.decode(token_ids[-(4 * longest + 1) :], clean_up_tokenization_spaces=False)
        return any(text in said for text in texts)
