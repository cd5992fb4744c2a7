"""New tokens for a language model's tokenizer: item ids, control words, a domain's terms.

Says which tokens, and from which old tokens each new row of embedding and head begins. It must not know models: the
rows are made in `model/vocabulary.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import model_validator

from burnish.component import Config
from burnish.errors import DataError
from burnish.types import NewTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AddTokens(Config):
    """Tokens that the model did not have. The export is then a whole model with a longer vocabulary."""

    tokens: list[str] | dict[str, str] | None = None
    """New tokens; or `{"<item_7>": "Toy Story (1995)"}`: each with a text that says what it means. This or `file`."""
    file: str | None = None
    """The same as a JSON list or object, or as a text file of one token a line. This or `tokens`."""
    initialise: Literal["subword_mean", "mean"] = "subword_mean"
    """Where a new row begins: at the mean of the rows of the tokens that spelt it until now (of its text, where it has
    one), or at the mean of all rows."""
    train: Literal["new_rows", "all_rows"] = "new_rows"
    """Which rows of embedding and head are trained, beside an adapter too: the new ones alone, or all."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.tokens is None) == (self.file is None):
            raise ValueError("give the new tokens by `tokens` or by `file`, one of the two")
        return self

    def extend(self, tokenizer: PreTrainedTokenizerBase) -> NewTokens:
        """Adds the tokens to `tokenizer` and says where their rows begin.

        Raises:
            DataError: the file cannot be read, or a token is empty, there twice, or known already.
        """
        meaning = self._meaning()
        known = tokenizer.get_vocab()
        for place, token in meaning:
            if not token.strip():
                raise DataError("a new token is empty", place, "remove it")
            if token in known:
                raise DataError(
                    f"'{token}' is a token already, with id {known[token]}", place, "remove it, or rename it"
                )
        listed = [token for _, token in meaning]
        if len(set(listed)) < len(listed):
            place, twice = next((p, t) for i, (p, t) in enumerate(meaning) if t in listed[:i])
            raise DataError(f"'{twice}' is listed twice", place, "remove one")
        texts = [meaning[pair] or pair[1] for pair in meaning]
        sources = tokenizer(texts, add_special_tokens=False).input_ids if self.initialise == "subword_mean" else None
        from tokenizers import AddedToken

        first = len(tokenizer)
        added: Any = [AddedToken(token, normalized=False) for token in listed]
        tokenizer.add_tokens(added)
        assert tokenizer.convert_tokens_to_ids(listed) == list(range(first, first + len(listed)))
        rows = tuple(map(tuple, sources)) if sources is not None else ((),) * len(listed)
        return NewTokens(first, rows, train_all=self.train == "all_rows")

    def _meaning(self) -> dict[tuple[str, str], str]:
        """(place, token) -> its text, or ''."""
        if self.tokens is not None:
            texts = self.tokens if isinstance(self.tokens, dict) else dict.fromkeys(self.tokens, "")
            if isinstance(self.tokens, list) and len(texts) < len(self.tokens):
                twice = next(token for i, token in enumerate(self.tokens) if token in self.tokens[:i])
                raise DataError(f"'{twice}' is listed twice", "data.tokenizer.add_tokens.tokens", "remove one")
            return {("data.tokenizer.add_tokens.tokens", token): text for token, text in texts.items()}
        assert self.file is not None
        try:
            text = Path(self.file).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"the file of new tokens cannot be read: {error}", self.file, _CURE) from error
        if not text.lstrip().startswith(("[", "{")) or not self.file.endswith(".json"):
            return {(f"{self.file}:{i}", line): "" for i, line in enumerate(text.splitlines(), 1)}
        try:
            listed = json.loads(text)
        except ValueError as error:
            raise DataError(f"the file of new tokens is not JSON: {error}", self.file, _CURE) from error
        texts = listed if isinstance(listed, dict) else dict.fromkeys(listed, "")
        if not all(isinstance(token, str) and isinstance(said, str) for token, said in texts.items()):
            raise DataError("a new token or its text is not a string", self.file, _CURE)
        return {(self.file, token): said for token, said in texts.items()}


_CURE = 'one token a line, or JSON: ["<a>", "<b>"] or {"<a>": "what it means"}'
