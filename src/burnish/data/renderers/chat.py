"""Conversations through the model's chat template, prompts with completions, and text: ids with a proved loss mask.

The parts: `formats/` says which documents a row is; `rendering/locate.py` finds their trained characters, in the
process that `rendering/sandbox.py` watches; `rendering/tokens.py` makes tokens of them, and `rendering/share.py` one
prompt of several. Knows no kind of row, and nothing of length limits and packing.
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

from burnish.data.formats import Completion, Conversation, Part, parts
from burnish.data.renderers.base import Renderer
from burnish.data.rendering.share import with_shared_prompt
from burnish.errors import DataError
from burnish.types import CONVERSATIONS, Group, Rendered, Row, RowFormat, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from burnish.data.dialogue import ChatDialogue
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
    share_prompt: bool = True
    """The prompt of a pair is computed once, and both answers attend to it; false: once for each answer."""

    def open(self, tokenizer: PreTrainedTokenizerBase, row_format: RowFormat = CONVERSATIONS) -> LiveChat:
        """Tries the template on probe conversations, in a process of its own.

        Raises:
            DataError: the tokenizer is not a fast one, or the template is missing, broken, exceeds a limit, or its mask
                cannot be proved. A tokenizer without a template is refused when a row needs one.
        """
        from burnish.data.rendering.probe import Report
        from burnish.data.rendering.sandbox import TemplateProcess

        if row_format.kind == "history":
            cure = "set `data.renderer: {type: events}`, and read them with the source `events`"
            raise DataError("a loss reads member histories, which have no chat template", "data.renderer", cure)
        if not tokenizer.is_fast:
            raise DataError(
                f"the tokenizer {tokenizer.name_or_path} is a slow one, which cannot say where a token came from",
                cure="convert it: AutoTokenizer.from_pretrained(path, use_fast=True).save_pretrained(path)",
            )
        if self.train_on == "all" and row_format.kind in ("preference", "unpaired", "stepwise"):
            raise DataError(
                "prompts are trained, and the losses of this workflow compare what is said behind them",
                where="data.renderer.train_on",
                cure="remove `train_on: all`",
            )
        name, source = self._template(tokenizer)
        if source is None:
            return LiveChat(tokenizer, None, None, None, self, row_format)
        specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        kwargs = json.loads(json.dumps(self.chat_template_kwargs))
        spec = {
            "source": source,
            "variables": {**tokenizer.special_tokens_map, **kwargs},
            "specials": list(dict.fromkeys([*specials, *tokenizer.all_special_tokens])),
            "today": self.today,
        }
        process = TemplateProcess(name, spec)
        return LiveChat(tokenizer, process, source, Report(**process.open()), self, row_format)

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
        config: Chat,
        row_format: RowFormat,
    ) -> None:
        from burnish.data.rendering.tokens import SpanTokenizer

        self.chat_template = chat_template
        """The source that rows were rendered with, to be exported."""
        self.report = report
        self._process = process
        self._row_format = row_format
        self._all = config.train_on == "all"
        self._share = config.share_prompt
        self._tokenizer = tokenizer
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
                texts = [text for draft in drafts if draft.refusal is None for text in draft.texts]
                self._tokenise([text for text in texts if text.part.steps is None])
                self._grade([text for text in texts if text.part.steps is not None])
                results += map(self._rendered, drafts)
        return results

    def dialogue(self, multi_turn: bool = False) -> ChatDialogue:
        """Rows as prompts: a `prompt` or messages, to which the template adds the opening of the model's turn.

        Raises:
            DataError: the template cannot lead a dialogue of several turns.
        """
        from burnish.data.dialogue import ChatDialogue

        return ChatDialogue(self._tokenizer, self._process, self._bos.tolist(), multi_turn)

    def _located(self, rows: Sequence[Row]) -> list[_Draft]:
        drafts = [self._draft(row) for row in rows]
        self._locate([(draft, text) for draft in drafts for text in draft.texts if text.record])
        return drafts

    def _draft(self, row: Row) -> _Draft:
        draft = _Draft(row)
        try:
            for part in parts(row, self._row_format):
                draft.texts.append(self._text(part))
        except DataError as error:
            draft.refuse(error)
        except _Unusable as unusable:
            draft.refuse(DataError(unusable.reason, row.where, unusable.cure))
        return draft

    def _text(self, part: Part) -> _Text:
        content = part.content
        if isinstance(content, Conversation):
            try:
                record = marshal.dumps((content.messages, content.tools, content.chat_template_kwargs))
            except ValueError:
                reason = "a message or tool holds a value that is not JSON (a date, bytes, an array)"
                raise _Unusable(reason, "write it as a string or a number") from None
            return _Text(part, record)
        if not len(self._eos):
            raise _Unusable("the tokenizer has no end-of-text token to end this text with", _EOS)
        if isinstance(content, Completion):
            text = content.prompt + content.completion
            return _Text(part, text=text, spans=[(0 if self._all else len(content.prompt), len(text))])
        return _Text(part, text=content.text, spans=[(0, len(content.text))])

    def _locate(self, texts: list[tuple[_Draft, _Text]]) -> None:
        if self._process is None:
            for draft, _ in texts:
                draft.refuse(DataError("the tokenizer has no chat template", draft.row.where, _NO_TEMPLATE))
            return
        if not texts:
            return
        for (draft, text), located in zip(texts, self._process.locate([text.record for _, text in texts]), strict=True):
            if isinstance(located, DataError):
                name = f"{text.part.name}: " if text.part.name else ""
                draft.refuse(DataError(name + located.reason, draft.row.where, located.cure))
            else:
                text.text, text.spans = located
                if self._all:
                    text.spans = [(0, len(text.text))]

    def _tokenise(self, texts: list[_Text]) -> None:
        encoded = self._tokens.encode([text.text for text in texts], [text.spans for text in texts])
        for text, tokens in zip(texts, encoded, strict=True):
            text.tokens = tokens

    def _grade(self, texts: list[_Text]) -> None:
        """Tokens of texts with steps: trained is the last token of each step."""
        places = []
        for text in texts:
            steps = text.part.steps
            assert steps is not None
            at = text.text.find(
                steps.text, text.spans[0][0] if text.spans else 0
            )  # the answer, as it is all that trains
            places.append([at + end - 1 for end in steps.ends] if at >= 0 else [])
        for text, tokens in zip(texts, self._tokens.at([text.text for text in texts], places), strict=True):
            text.tokens = tokens

    def _rendered(self, draft: _Draft) -> Rendered:
        if draft.refusal is not None:
            return Rendered(draft.row, None, Counter(), draft.refusal)
        samples = [self._sample(text, draft.row) for text in draft.texts]
        trained = [int(sample.loss_mask.sum()) for sample in samples]
        for text, num_trained in zip(draft.texts, trained, strict=True):
            if (refusal := _refusal(text.part, num_trained)) is not None:
                fates = Counter({"dropped: no token to train": sum(map(len, samples))})
                return Rendered(draft.row, None, fates, DataError(refusal.reason, draft.row.where, refusal.cure))
        boundary = sum(text.tokens.boundary for text in draft.texts if text.tokens is not None)
        group = Group(with_shared_prompt(samples, boundary) if self._share else tuple(samples))
        masked = len(group) - sum(trained) - boundary
        fates = Counter(trained=sum(trained), masked=masked, boundary=boundary)
        return Rendered(draft.row, group, fates)

    def _sample(self, text: _Text, row: Row) -> Sample:
        assert text.tokens is not None
        ids, trained, _ = text.tokens
        if not text.record:  # no template wrote the special tokens that begin and end a text
            ids = np.concatenate([self._bos, ids, self._eos])
            trained = np.concatenate([np.zeros(len(self._bos), bool), trained, [text.part.steps is None]])
        trained[:1] = False  # nothing stands before it that could predict it
        weight = text.part.content.weight
        # Every sample has it, so that all packed rows of a run have the same columns.
        columns = {"weight": np.array(1.0 if weight is None else weight, np.float32)}
        for name, value in text.part.columns.items():
            columns[name] = np.array(value, np.float32)
        if text.part.steps is not None:
            columns["label"] = np.full(len(ids), np.nan, np.float32)
            columns["label"][trained] = text.part.steps.labels[: int(trained.sum())]
        return Sample(ids, trained, row.where, columns)


def _refusal(part: Part, num_trained: int) -> _Unusable | None:
    """Why this document teaches nothing, if it does not."""
    if part.steps is not None and num_trained != len(part.steps.labels):
        return _Unusable(f"{len(part.steps.labels)} steps end at {num_trained} tokens", _STEPS)
    if num_trained or not part.trains:
        return None
    name = f"{part.name}:" if part.name else "the row has"
    return _Unusable(f"{name} no token to train", _NOTHING)


class _Unusable(Exception):
    """A document that cannot be used: reason and cure, on its way to whoever knows the row's place."""

    def __init__(self, reason: str, cure: str) -> None:
        super().__init__(reason, cure)
        self.reason, self.cure = reason, cure


@dataclass(slots=True)
class _Text:
    """A document of a row on its way."""

    part: Part
    record: bytes = b""
    """A conversation, as the template process takes it; empty for text without a template."""
    text: str = ""
    spans: list[tuple[int, int]] = field(default_factory=list)
    tokens: Tokens | None = None


@dataclass(slots=True)
class _Draft:
    """A row on its way."""

    row: Row
    texts: list[_Text] = field(default_factory=list)
    refusal: DataError | None = None

    def refuse(self, error: DataError) -> None:
        """Notes the first thing that is wrong."""
        self.refusal = self.refusal or error


_CHUNK = 32
"""Rows rendered and tokenised at once."""
_EOS = "name one in its tokenizer_config.json: `eos_token`"
_NO_TEMPLATE = "give one with `data.renderer.chat_template_path`, or use rows of prompt and completion, or of text"
_NOTHING = "remove the row, or let an assistant turn of it be trained"
_STEPS = "the template must render each step as it is written, and each must end with a token of its own"
