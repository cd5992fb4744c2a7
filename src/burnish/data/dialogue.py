"""Rows as prompts in text, and what is said between the turns of a conversation: tokens in, tokens out.

The chat template writes prompts and what stands between two sampled turns, in its own process; what was sampled is
kept as it was sampled, and never rendered or tokenised again. Where there is no template, prompts are plain text. Knows
nothing of sources, lengths and engines.
"""

from __future__ import annotations

import json
import marshal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from burnish.data.formats.asked import asked
from burnish.data.messages import Refused, check_text, checked_messages
from burnish.errors import DataError
from burnish.rollouts import Dropped, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from burnish.data.rendering.sandbox import TemplateProcess
    from burnish.types import Row

ARGUMENTS = ("prompts", "completions", "completion_ids", "finish_reason")
"""What rewards are given beside a row's columns, which may not be called so."""
UNUSED = "unused"
"""What a column is renamed to that nobody should read."""
_ASKING = ("messages", "conversations", "instruction", "input", "history", "system")
"""Columns that a row without a `prompt` asks by."""
_NO_TEMPLATE = "give one with `data.renderer.chat_template_path`, or write prompts as strings"


@dataclass(slots=True)
class _Draft:
    """A row on its way to a prompt."""

    asked: Any
    columns: dict[str, Any]
    record: bytes = b""
    """As the template process takes it; empty for plain text."""
    text: str = ""


class ChatDialogue:
    """Messages, or plain text where the tokenizer has no template; see `rollouts.Dialogue`.

    A `prompt` that is a string is what a user says, as in supervised data of that kind, where there is a template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, process: TemplateProcess | None, bos: Sequence[int], multi_turn: bool
    ) -> None:
        """Tries the template.

        Raises:
            DataError: a dialogue of several turns is wanted, and the template cannot lead one.
        """
        self._backend: Any = tokenizer.backend_tokenizer
        self._tokenizer, self._process, self._bos = tokenizer, process, list(bos)
        eos: list[Any] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.stop_token_ids: tuple[int, ...] = tuple(eos)
        if process is None:
            return
        (tried,) = process.answers("dialogue", [b""])
        if isinstance(tried, DataError):
            raise tried
        ends, failure = tried
        if multi_turn and failure:
            raise DataError(
                f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} cannot lead a dialogue: {failure}",
                where="data.renderer",
                cure="give another with `data.renderer.chat_template_path`, or use an environment of one turn",
            )
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        lasts = [self._ids(end)[-1] for end in ends]
        self.stop_token_ids = tuple(dict.fromkeys([*(last for last in lasts if last in special), *eos]))

    def prompts(self, rows: Sequence[Row], first_index: int) -> list[Prompt | Dropped | DataError]:
        """One a row, rendered and tokenised together."""
        drafts = [self._draft(row) for row in rows]
        whole = [draft for draft in drafts if isinstance(draft, _Draft)]
        chats = [draft for draft in whole if draft.record]
        refused: dict[int, DataError] = {}
        answers = self._process.answers("ask", [draft.record for draft in chats]) if self._process and chats else []
        for draft, answer in zip(chats, answers, strict=True):
            if isinstance(answer, DataError):
                refused[id(draft)] = answer
            else:
                (draft.text,) = answer
        encodings = self._backend.encode_batch([draft.text for draft in whole], add_special_tokens=False)
        ids = {id(draft): encoding.ids for draft, encoding in zip(whole, encodings, strict=True)}
        found: list[Prompt | Dropped | DataError] = []
        for index, (row, draft) in enumerate(zip(rows, drafts, strict=True), first_index):
            if isinstance(draft, DataError):
                found.append(draft)
            elif (error := refused.get(id(draft))) is not None:
                found.append(DataError(error.reason, row.where, error.cure))
            else:
                token_ids = [*([] if draft.record else self._bos), *ids[id(draft)]]
                found.append(Prompt(index, row.where, token_ids, draft.asked, draft.columns))
        return found

    def text(self, token_ids: Sequence[int]) -> str:
        """As it was sampled, less special tokens."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)  # pyright: ignore[reportReturnType]

    def said(self, prompt: Prompt, turns: Sequence[Any]) -> Any:
        """Messages, or a string where the prompt is one."""
        if isinstance(prompt.asked, str):
            return "".join(self.text(turn) if _is_sampled(turn) else _joined(turn) for turn in turns)
        said: list[dict[str, Any]] = []
        for turn in turns:
            said += [{"role": "assistant", "content": self.text(turn)}] if _is_sampled(turn) else turn
        return said

    def observe(self, prompt: Prompt, turns: Sequence[Any], messages: list[dict[str, Any]]) -> list[int]:
        """See `rollouts.Dialogue`. A token that ended the turn and is the template's is not written twice; where the
        turn ended otherwise (a stop text, another model's end), the template's end follows it, untrained."""
        try:
            heard = checked_messages(messages, "observation") if messages else []
        except Refused as refused:
            raise DataError(refused.reason, prompt.where, refused.cure) from None
        if isinstance(prompt.asked, str):
            return self._ids(_joined(heard))
        assert self._process is not None
        before = [None if _is_sampled(turn) else turn for turn in turns]
        tools, kwargs = prompt.columns.get("tools"), prompt.columns.get("chat_template_kwargs") or {}
        (answer,) = self._process.answers("between", [marshal.dumps((prompt.asked, [*before, heard], tools, kwargs))])
        if isinstance(answer, DataError):
            raise DataError(answer.reason, prompt.where, answer.cure)
        tail, head = answer
        last = turns[-1][-1:]
        if last and last[0] in self.stop_token_ids:
            at = tail.find(self._tokenizer.convert_ids_to_tokens(last[0]), 0, head)
            if at >= 0:
                # With the token in front, so that a tokenizer which looks at it does; it is single, being special.
                return self._ids(tail[at:])[1:]
        return self._ids(tail)

    def _ids(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def _draft(self, row: Row) -> _Draft | DataError:
        try:
            if self._process is None:
                prompt = row.record.get("prompt")
                if not isinstance(prompt, str) or not prompt:
                    reason = "the tokenizer has no chat template, and the row no `prompt` that is a string"
                    return DataError(reason, row.where, _NO_TEMPLATE)
                check_text(prompt, "prompt")
                return _Draft(prompt, json_columns(row, ("prompt",)), text=prompt)
            question = asked(row)
            columns = json_columns(row, ("prompt",) if row.record.get("prompt") is not None else _ASKING)
        except Refused as refused:
            return DataError(refused.reason, row.where, refused.cure)
        except DataError as error:
            return error
        messages = [{key: value for key, value in message.items() if key != "train"} for message in question.messages]
        given = {"tools": question.tools, "chat_template_kwargs": question.chat_template_kwargs}
        columns |= {name: value for name, value in given.items() if name in columns}
        try:
            record = marshal.dumps((messages, question.tools, question.chat_template_kwargs))
        except ValueError:
            reason = "a message or tool holds a value that is not JSON (a date, bytes, an array)"
            return DataError(reason, row.where, "write it as a string or a number")
        return _Draft(messages, columns, record)


def json_columns(row: Row, without: Sequence[str]) -> dict[str, Any]:
    """The row's columns but some, as plain JSON.

    Raises:
        DataError: one is not JSON, or is called as something else that rewards are given.
    """
    columns = {}
    for name, value in row.record.items():
        if name in without or name == UNUSED:
            continue
        leave_out = f"`columns: {{{name}: {UNUSED}}}` in the source leaves it out"
        if name in ARGUMENTS:
            raise DataError(f"a column is called `{name}`, which rewards are given already", row.where, leave_out)
        try:
            columns[name] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            reason = f"{name}: a {type(value).__name__} is not JSON, and rewards are given each column"
            raise DataError(reason, row.where, f"write it as a string or a number; {leave_out}") from None
    return columns


def _is_sampled(turn: Sequence[Any]) -> bool:
    """Token ids rather than messages; a turn of which nothing was sampled is one too."""
    return not turn or not isinstance(turn[0], dict)


def _joined(messages: Sequence[dict[str, Any]]) -> str:
    contents = [message.get("content") or "" for message in messages]
    return "".join(one if isinstance(one, str) else "".join(part["text"] for part in one) for one in contents)
