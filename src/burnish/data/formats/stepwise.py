"""Solutions with a grade for each step.

Accepted: `prompt` (a string, or messages), `completions` (a list of strings, one a step) and `labels`: as many, true or
false or a number between 0 and 1. A row may add `tools`, `chat_template_kwargs`, `weight`. Steps are joined by line
breaks, but where white space already stands between two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from burnish.data.formats.base import Completion, Part, Steps, as_conversation, context, text_of, weight_of, wrong_kind
from burnish.data.messages import Refused, check_text, shown

if TYPE_CHECKING:
    from burnish.types import RowFormat


def parts(record: dict[str, Any], _: RowFormat) -> list[Part]:
    """The solution behind its prompt, the last token of each step graded."""
    missing = [name for name in ("prompt", "completions", "labels") if record.get(name) is None]
    if len(missing) == 3 or missing == ["completions", "labels"]:
        raise wrong_kind(record, "stepwise", "prompt, completions and labels")
    if missing:
        raise Refused(f"{missing[0]}: is missing", "a row has a prompt, its steps as `completions`, and their `labels`")
    prompt = record["prompt"]
    steps = _steps(record["completions"], _labels(record), after=prompt if isinstance(prompt, str) else None)
    if isinstance(prompt, str):
        return [Part(Completion(text_of(prompt, "prompt"), steps.text, weight_of(record)), steps=steps)]
    messages = [*context(prompt, "prompt"), {"role": "assistant", "content": steps.text}]
    return [Part(as_conversation(record, messages), steps=steps)]


def _labels(record: dict[str, Any]) -> tuple[float, ...]:
    steps, labels = record["completions"], record["labels"]
    for name, values in (("completions", steps), ("labels", labels)):
        if not isinstance(values, list) or not values:
            raise Refused(f"{name}: {shown(values)} is not a list with an entry for each step", "remove the row")
    if len(steps) != len(labels):
        raise Refused(f"{len(steps)} completions and {len(labels)} labels", "each step has one label")
    for index, label in enumerate(labels):
        if not isinstance(label, bool | int | float) or not 0 <= label <= 1:
            cure = "write true or false, or a number from 0 (wrong) to 1 (right)"
            raise Refused(f"labels[{index}]: {shown(label)} does not grade a step", cure)
    return tuple(map(float, labels))


def _steps(written: list[Any], labels: tuple[float, ...], after: str | None) -> Steps:
    """`after`: the text that the first step follows; None where a template stands between."""
    text, ends = "", []
    for index, step in enumerate(written):
        if not isinstance(step, str) or not step.strip():
            raise Refused(f"completions[{index}]: {shown(step)} is not a step", "write each step as a string")
        check_text(step, f"completions[{index}]")
        before = text if index else after
        if before is None:
            step = step.lstrip()  # as templates strip what a turn begins and ends with
        elif before and not before[-1].isspace() and not step[0].isspace():
            text += "\n"
        text += step
        ends.append(len(text.rstrip()))
    return Steps(text if after is not None else text.rstrip(), tuple(ends), labels)
