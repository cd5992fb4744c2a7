"""Answers to many questions, in batches, appended to a file of conversations as they come.

One JSON object a line: `messages`, the last of them the answer, which supervised fine-tuning reads (sequence-level
distillation: Kim and Rush, arXiv:1606.07947), and `answers`, the place of the row that asked. It must not know how rows
are read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from burnish.errors import DataError
from burnish.rollout.generate import load_chat


@dataclass(frozen=True, slots=True)
class Question:
    """Turns that the model is to answer, and the row they came from."""

    where: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def answered(self, text: str) -> dict[str, Any]:
        """The row that says this."""
        row: dict[str, Any] = {"messages": [*self.messages, {"role": "assistant", "content": text}]}
        row |= {"tools": self.tools} if self.tools else {}
        row |= {"chat_template_kwargs": self.chat_template_kwargs} if self.chat_template_kwargs else {}
        return row | {"answers": self.where}


@dataclass(frozen=True, slots=True)
class Tally:
    """How far it is."""

    asked: int
    """Answers asked for so far, in this call."""
    written: int
    unfinished: int
    """Not written: cut off at `max_new_tokens`, where a model trained on them would learn to stop, or empty."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn."""

    max_new_tokens: int
    temperature: float
    """0: the likeliest token."""
    seed: int


def answered_before(path: Path) -> Counter[str]:
    """How many answers each row has in the file; a last line that was torn off is removed from it.

    Raises:
        DataError: a line that is not such an answer.
    """
    if not path.exists():
        return Counter()
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    found: Counter[str] = Counter()
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            found[json.loads(line)["answers"]] += 1
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                "the line is no answer that `burnish generate` wrote", f"{path}:{number}", "give `--to` another file"
            ) from error
    return found


def answer_all(
    model_path: str, questions: Sequence[Question], to: Path, *, num_answers: int, sampling: Sampling, batch_size: int
) -> Iterator[Tally]:
    """Appends the answers that `to` does not hold yet, question by question; a tally after each batch.

    Raises:
        ModelError: see `load_chat`.
        DataError: see `answered_before`; also a row that the chat template refuses.
    """
    had = answered_before(to)
    open_questions = [q for q in questions for _ in range(num_answers - had[q.where])]
    if not open_questions:
        return
    chat = _Chat(model_path, sampling)
    written = unfinished = 0
    with to.open("a", encoding="utf-8") as file:
        for start in range(0, len(open_questions), batch_size):
            batch = open_questions[start : start + batch_size]
            answers = chat.answers(batch, seed=sampling.seed + sum(had.values()) + start)
            finished = [(q, text) for q, text in zip(batch, answers, strict=True) if text.strip()]
            _append(file, [question.answered(text) for question, text in finished])
            written += len(finished)
            unfinished += len(batch) - len(finished)
            yield Tally(start + len(batch), written, unfinished)


def _append(file: IO[str], rows: list[dict[str, Any]]) -> None:
    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.flush()


class _Chat:
    """A model that answers several conversations at once."""

    def __init__(self, path: str, sampling: Sampling) -> None:
        self.tokenizer, self.model = load_chat(path)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        ends = self.model.generation_config.eos_token_id
        self.ends = set(ends) if isinstance(ends, list) else {ends}
        self.arguments: dict[str, Any] = {
            "max_new_tokens": sampling.max_new_tokens,
            "do_sample": sampling.temperature > 0,
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        if sampling.temperature > 0:
            self.arguments["temperature"] = sampling.temperature

    def answers(self, questions: list[Question], *, seed: int) -> list[str]:
        """One text for each; empty where it did not end."""
        import torch

        texts = [self._rendered(question) for question in questions]
        inputs = self.tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        torch.manual_seed(seed)
        prompt_length = inputs["input_ids"].shape[1]
        ids = self.model.generate(**inputs, **self.arguments)[:, prompt_length:].tolist()
        return [self._text(row) for row in ids]

    def _text(self, ids: list[int]) -> str:
        end = next((place for place, token in enumerate(ids) if token in self.ends), None)
        return "" if end is None else self.tokenizer.decode(ids[:end], skip_special_tokens=True)

    def _rendered(self, question: Question) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                question.messages,
                tools=question.tools,
                add_generation_prompt=True,
                tokenize=False,
                **question.chat_template_kwargs,
            )
        except Exception as error:  # a template is a program: of a content that is a list it says TypeError
            raise DataError(
                f"the chat template refuses it: {error}", question.where, "fix or remove the row"
            ) from error
