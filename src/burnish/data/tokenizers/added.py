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
        from tokenizers import AddedToken

        from burnish.data.tokenizers.vocabulary import items_of

        if items_of(tokenizer) is not None:
            cure = "list all its items with `data.tokenizer: {type: vocabulary, ...}`"
            raise DataError("a vocabulary of items takes no new tokens", "data.tokenizer.add_tokens", cure)
        listed = self._listed()
        known, seen = tokenizer.get_vocab(), set[str]()
        for place, token, _ in listed:
            if not token.strip():
                raise DataError("a new token is empty", place, "remove it")
            if token in known:
                raise DataError(
                    f"'{token}' is a token already, with id {known[token]}", place, "remove it, or rename it"
                )
            if token in seen:
                raise DataError(f"'{token}' is listed twice", place, "remove one")
            seen.add(token)
        tokens, texts = [token for _, token, _ in listed], [text or token for _, token, text in listed]
        sources = tokenizer(texts, add_special_tokens=False).input_ids if self.initialise == "subword_mean" else None
        first = len(tokenizer)
        added: Any = [AddedToken(token, normalized=False) for token in tokens]
        tokenizer.add_tokens(added)
        assert tokenizer.convert_tokens_to_ids(tokens) == list(range(first, first + len(tokens)))
        rows = tuple(map(tuple, sources)) if sources is not None else ((),) * len(tokens)
        return NewTokens(first, rows, train_all=self.train == "all_rows")

    def _listed(self) -> list[tuple[str, str, str]]:
        """(place, token, its text or ''), at least one."""
        place = self.file or "data.tokenizer.add_tokens.tokens"
        said = self.tokens if self.file is None else self._read(self.file)
        if isinstance(said, str):
            found = [(f"{place}:{i}", token, "") for i, token in enumerate(said.splitlines(), 1)]
        else:
            found = [(place, token, said[token] if isinstance(said, dict) else "") for token in said or ()]
        if not found:
            raise DataError("there is no new token", place, _CURE)
        if not all(isinstance(token, str) and isinstance(text, str) for _, token, text in found):
            raise DataError("a new token or its text is not a string", place, _CURE)
        return found

    def _read(self, file: str) -> str | list[str] | dict[str, str]:
        """A text of one token a line, or what a JSON file holds."""
        try:
            text = Path(file).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"the file of new tokens cannot be read: {error}", file, _CURE) from error
        if not text.lstrip().startswith(("[", "{")) or not file.endswith(".json"):
            return text
        try:
            return json.loads(text)
        except ValueError as error:
            raise DataError(f"the file of new tokens is not JSON: {error}", file, _CURE) from error


_CURE = 'one token a line, or JSON: ["<a>", "<b>"] or {"<a>": "what it means"}'
