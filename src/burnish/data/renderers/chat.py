"""Conversations through the model's chat template, prompts with completions, and text: ids with a proved loss mask.

The parts: `rendering/locate.py` finds the trained characters, in the process that `rendering/sandbox.py` watches;
`rendering/tokens.py` makes tokens of them. Knows nothing of length limits and packing.
"""

from __future__ import annotations

import json
import marshal
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from burnish.data.renderers.base import Renderer
from burnish.errors import DataError
from burnish.types import Group, Rendered, Row, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from burnish.data.rendering.probe import Report
    from burnish.data.rendering.sandbox import TemplateProcess
    from burnish.data.rendering.tokens import Tokens


class Chat(Renderer):
    """Chat template, completion or text, as each row asks. What the model writes is trained: the content of assistant
    turns, their reasoning and tool calls, and the token that ends the turn; never what it reads.
    """

    type: Literal["chat"] = "chat"
    chat_template_path: str | None = None
    """A jinja file to use in place of the tokenizer's own template. It is exported with the model."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables for the template, `{enable_thinking: false}`; a row's own `chat_template_kwargs` win."""
    train_on: Literal["assistant", "all"] = "assistant"
    """`all`: every token of a conversation or completion, prompts included."""
    today: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] = "2025-01-01"
    """The date for templates that write today's: fixed, so that a run resumed tomorrow sees the same tokens."""

    def open(self, tokenizer: PreTrainedTokenizerBase) -> LiveChat:
        """Tries the template on probe conversations, in a process of its own.

        Raises:
            DataError: the tokenizer is not a fast one, or the template is missing, broken, exceeds a limit, or its mask
                cannot be proved. A tokenizer without a template is refused when a row needs one.
        """
        from burnish.data.rendering.probe import Report
        from burnish.data.rendering.sandbox import TemplateProcess

        if not tokenizer.is_fast:
            raise DataError(
                f"the tokenizer {tokenizer.name_or_path} is a slow one, which cannot say where a token came from",
                cure="convert it: AutoTokenizer.from_pretrained(path, use_fast=True).save_pretrained(path)",
            )
        name, source = self._template(tokenizer)
        if source is None:
            return LiveChat(tokenizer, None, None, None, self.train_on)
        specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        kwargs = json.loads(json.dumps(self.chat_template_kwargs))
        spec = {
            "source": source,
            "variables": {**tokenizer.special_tokens_map, **kwargs},
            "specials": list(dict.fromkeys([*specials, *tokenizer.all_special_tokens])),
            "today": self.today,
        }
        process = TemplateProcess(name, spec)
        return LiveChat(tokenizer, process, source, Report(**process.open()), self.train_on)

    def _template(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str | None]:
        if self.chat_template_path is None:
            if tokenizer.chat_template is None:
                return "", None
            return tokenizer.name_or_path or "the tokenizer", tokenizer.get_chat_template()
        try:
            return self.chat_template_path, Path(self.chat_template_path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"the chat template cannot be read: {error}",
                where=self.chat_template_path,
                cure="correct `data.renderer.chat_template_path`",
            ) from error


class LiveChat:
    """The chat renderer of one tokenizer. `report` says what the template does; None: there is no template."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        process: TemplateProcess | None,
        chat_template: str | None,
        report: Report | None,
        train_on: str,
    ) -> None:
        from burnish.data.rendering.tokens import SpanTokenizer

        self.chat_template = chat_template
        """The source that rows were rendered with, to be exported."""
        self.report = report
        self._process = process
        self._all = train_on == "all"
        self._tokens = SpanTokenizer(tokenizer)
        eos = tokenizer.eos_token_id
        self._eos = np.array([] if eos is None else [eos], np.int32)
        start = np.array(tokenizer("").input_ids[:1], np.int32)
        self._bos = start if len(start) and start[0] == tokenizer.bos_token_id else start[:0]

    def render(self, rows: Sequence[Row]) -> list[Rendered]:
        """One result a row, in order. A row that cannot be trained carries its refusal."""
        chunks = [rows[i : i + _CHUNK] for i in range(0, len(rows), _CHUNK)]
        results: list[Rendered] = []
        # The template process renders a chunk while this one tokenises the chunk before.
        with ThreadPoolExecutor(1) as ahead:
            for drafts in ahead.map(self._located, chunks):
                texts = [draft for draft in drafts if draft.refusal is None]
                encoded = self._tokens.encode([draft.text for draft in texts], [draft.spans for draft in texts])
                for draft, tokens in zip(texts, encoded, strict=True):
                    draft.tokens = tokens
                results += map(self._rendered, drafts)
        return results

    def _located(self, rows: Sequence[Row]) -> list[_Draft]:
        drafts = [self._draft(row) for row in rows]
        self._locate([draft for draft in drafts if draft.record])
        return drafts

    def _draft(self, row: Row) -> _Draft:
        from burnish.data.formats import Completion, Conversation, conversation

        try:
            record = conversation(row)
        except DataError as error:
            return _Draft(row, refusal=error)
        draft = _Draft(row, weight=record.weight)
        if isinstance(record, Conversation):
            try:
                draft.record = marshal.dumps((record.messages, record.tools, record.chat_template_kwargs))
            except ValueError:
                reason = "a message or tool holds a value that is not JSON (a date, bytes, an array)"
                draft.refusal = DataError(reason, row.where, "write it as a string or a number")
        elif not len(self._eos):
            draft.refusal = DataError("the tokenizer has no end-of-text token to end this text with", row.where, _EOS)
        elif isinstance(record, Completion):
            draft.text, draft.whole = record.prompt + record.completion, True
            draft.spans = [(0 if self._all else len(record.prompt), len(draft.text))]
        else:
            draft.text, draft.spans, draft.whole = record.text, [(0, len(record.text))], True
        return draft

    def _locate(self, drafts: list[_Draft]) -> None:
        if self._process is None:
            for draft in drafts:
                draft.refusal = DataError("the tokenizer has no chat template", draft.row.where, _NO_TEMPLATE)
            return
        if not drafts:
            return
        for draft, located in zip(drafts, self._process.locate([draft.record for draft in drafts]), strict=True):
            if isinstance(located, DataError):
                draft.refusal = DataError(located.reason, draft.row.where, located.cure)
            else:
                draft.text, draft.spans = located
                if self._all:
                    draft.spans = [(0, len(draft.text))]

    def _rendered(self, draft: _Draft) -> Rendered:
        if draft.refusal is not None:
            return Rendered(draft.row, None, Counter(), draft.refusal)
        assert draft.tokens is not None
        ids, trained, boundary = draft.tokens
        if draft.whole:  # no template wrote the special tokens that begin and end a text
            ids = np.concatenate([self._bos, ids, self._eos])
            trained = np.concatenate([np.zeros(len(self._bos), bool), trained, [True]])
        trained[:1] = False  # nothing stands before it that could predict it
        num_trained = int(trained.sum())
        if not num_trained:
            refusal = DataError("the row has no token to train", draft.row.where, _NOTHING)
            return Rendered(draft.row, None, Counter({"dropped: no token to train": len(ids)}), refusal)
        # Every sample has it, so that all packed rows of a run have the same columns.
        columns = {"weight": np.array(1.0 if draft.weight is None else draft.weight, np.float32)}
        fates = Counter(trained=num_trained, masked=len(ids) - num_trained - boundary, boundary=boundary)
        return Rendered(draft.row, Group((Sample(ids, trained, draft.row.where, columns),)), fates)


@dataclass(slots=True)
class _Draft:
    """A row on its way."""

    row: Row
    weight: float | None = None
    record: bytes = b""
    """A conversation, as the template process takes it; empty for others."""
    text: str = ""
    spans: list[tuple[int, int]] = field(default_factory=list)
    whole: bool = False
    """Text without a template: it still needs its first and last special tokens."""
    tokens: Tokens | None = None
    refusal: DataError | None = None


_CHUNK = 32
"""Rows rendered and tokenised at once."""
_EOS = "name one in its tokenizer_config.json: `eos_token`"
_NO_TEMPLATE = "give one with `data.renderer.chat_template_path`, or use rows of prompt and completion, or of text"
_NOTHING = "remove the row, or let an assistant turn of it be trained"
