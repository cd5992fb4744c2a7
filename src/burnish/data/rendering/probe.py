"""Learns from a few small conversations what a chat template does: its anchors, and what people should know.

Runs inside the template process.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from burnish.data.rendering.locate import locate, said
from burnish.data.rendering.marker import Anchors, Message, Refused, as_parts
from burnish.data.rendering.template import ChatTemplate, mark, take_marks

_Q, _A = 4000, 4001
USER = {"role": "user", "content": "How far?"}
REPLY = {"role": "assistant", "content": "Two miles."}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks something up.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string", "description": "What."}},
            "required": ["query"],
        },
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "id": "abcdefghi", "function": {"name": "look_up", "arguments": {"query": "Rome"}}}
    ],
}
RESULT = {"role": "tool", "name": "look_up", "tool_call_id": "abcdefghi", "content": "Far."}


@dataclass(frozen=True, slots=True)
class Report:
    """What a chat template does with conversations; every line was tried, not read."""

    tags: bool
    """It has `{% generation %}` tags; they were compared with the counterfactual."""
    generation_prompt: str
    """Never trained; what a turn holds after it is."""
    end_of_turn: tuple[str, ...]
    """Trained. Empty: no special token ends a turn, so a model would not learn to stop."""
    last_turn_ends: bool
    """False: the last turn of a conversation has no end-of-turn token (GLM: the next turn's header is the end)."""
    system: str
    """`rendered`, or why not."""
    reasoning: str
    """`kept`, `kept in the last turn only`, or why not."""
    tool_calls: str
    """`rendered`, or why not."""
    content_as_parts: bool
    """It takes content as a list of parts; strings are converted."""
    dated: bool
    """It writes today's date, which is the renderer's `today`."""
    as_served: bool
    """The prompt of the last turn, as a server renders it, is a prefix of the training text."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def learn(template: ChatTemplate, specials: list[str], extra: dict[str, Any]) -> Anchors:
    """The anchors of a template under these `chat_template_kwargs`.

    Raises:
        Refused: it renders neither a chat of one turn nor of two.
    """
    pattern = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)")
    failure = ""
    for parts in (False, True):
        for chat in ([USER, REPLY, USER, REPLY], [USER, REPLY]):
            messages = [as_parts(message) for message in chat] if parts else chat
            try:
                middle, last = tails(template, messages, None, extra)
            except Exception as error:
                failure = failure or said(error)
                continue
            if last is None:
                failure = failure or "it does not render the content of the messages"
                continue
            prompt = _prompt(template, extra, parts, pattern)
            ends = _ends(middle, last, prompt, pattern)
            ends += tuple(end for end in _call_ends(template, extra, pattern, ends) if end not in ends)
            return Anchors(prompt, ends, pattern, parts)
    raise Refused(
        f"the chat template renders no conversation: {failure}",
        "check it, or give another with `renderer.chat_template_path`",
    )


def report(template: ChatTemplate, anchors: Anchors, extra: dict[str, Any]) -> Report:
    """Tries the locators on every kind of conversation.

    Raises:
        Refused: the mask of even the plainest conversation cannot be proved.
    """
    text, turns = locate(template, anchors, [USER, REPLY], None, extra)
    messages = [as_parts(USER) if anchors.parts else USER]
    try:
        as_served = text.startswith(template.render(messages, None, extra, prompt=True))
    except Exception:  # it refuses a chat that ends with the user: then nothing is served from it
        as_served = False
    return Report(
        tags=template.has_tags,
        generation_prompt=anchors.prompt,
        end_of_turn=anchors.ends,
        last_turn_ends=turns[-1].ended,
        system=_tried(template, anchors, [{"role": "system", "content": "Be brief."}, USER, REPLY], None, extra),
        reasoning=_reasoning(template, anchors, extra),
        tool_calls=_tried(template, anchors, [USER, CALL, RESULT, REPLY], [TOOL], extra),
        content_as_parts=anchors.parts,
        dated="strftime_now" in template.source,
        as_served=as_served,
    )


def _tried(
    template: ChatTemplate,
    anchors: Anchors,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    extra: dict[str, Any],
) -> str:
    try:
        locate(template, anchors, messages, tools, extra)
    except Refused as refused:
        return refused.reason
    return "rendered"


def _reasoning(template: ChatTemplate, anchors: Anchors, extra: dict[str, Any]) -> str:
    key = "reasoning_content" if "reasoning_content" in template.source else "thinking"
    if key not in template.source:
        return "rendered as content" if template.thought_tags else "never rendered"
    thoughtful = {**REPLY, key: "Measured once."}
    outcome = _tried(template, anchors, [USER, thoughtful], None, extra)
    if outcome != "rendered":
        return outcome
    try:
        text, _ = locate(template, anchors, [USER, thoughtful, USER, REPLY], None, extra)
    except Refused as refused:
        return refused.reason
    return "kept" if "Measured once." in text else "kept in the last turn only"


def tails(
    template: ChatTemplate, messages: list[Message], tools: list[dict[str, Any]] | None, extra: dict[str, Any]
) -> tuple[str | None, str | None]:
    """What follows the first assistant turn up to the next content, and what follows the last. None: no such turn."""
    marked = []
    for message in messages:
        mark_id = _A if message["role"] == "assistant" else _Q
        marked.append(_surrounded(message, mark(mark_id)))
    text, marks = take_marks(template.render(marked, tools, extra))
    ours = [i for i, (mark_id, _) in enumerate(marks) if mark_id == _A]
    if not ours:
        return None, None
    last = text[marks[-1][1] :] if marks[-1][0] == _A else None
    theirs = next((i for i in range(ours[0], len(marks)) if marks[i][0] == _Q), None)
    middle = text[marks[theirs - 1][1] : marks[theirs][1]] if theirs else None
    return middle, last


def _surrounded(message: Message, sign: str) -> Message:
    content = message["content"]
    if isinstance(content, list):
        content = [{**part, "text": sign + part["text"] + sign} for part in content]
    elif content:
        content = sign + content + sign
    if "tool_calls" not in message:
        return {**message, "content": content}
    call = message["tool_calls"][0]
    function = {**call["function"], "arguments": {"query": sign + "Rome" + sign}}
    return {**message, "content": content, "tool_calls": [{**call, "function": function}]}


def _ends(middle: str | None, last: str, prompt: str, specials: re.Pattern[str]) -> tuple[str, ...]:
    """What ends a turn, from what follows one in the middle and at the end of a chat.

    `<|im_end|>\\n<|im_start|>user\\n` and `<|im_end|>\\n` give `<|im_end|>`; of several in a row (Cohere) all
    count; where nothing is common (gpt-oss, GLM) it is the first special token of each.
    """
    tails = [last] if middle is None else [middle, last]
    pieces = _pieces(_common(tails, specials), specials)
    if len(pieces) == 1:
        firsts = [found.group() for tail in tails if (found := specials.search(tail))]
        return tuple(dict.fromkeys(firsts))
    run = pieces[1]
    for between, special in zip(pieces[2::2], pieces[3::2], strict=False):
        if between or special in prompt:
            break
        run += special
    return (run,)


def _call_ends(
    template: ChatTemplate, extra: dict[str, Any], specials: re.Pattern[str], known: tuple[str, ...]
) -> tuple[str, ...]:
    """How a turn of tool calls ends, where that is not as any turn does: gpt-oss `<|call|>`, Gemma 4 `<tool_call|>`."""
    try:
        _, last = tails(template, [USER, CALL], [TOOL], extra)
        middle, _ = tails(template, [USER, CALL, RESULT], [TOOL], extra)
    except Exception:  # no tool calls in this template, or it wants the result: the rows will tell
        return ()
    if last is None or middle is None:
        return ()
    common = _common([middle, last], specials)
    if any(end in common for end in known):
        return ()
    if found := specials.findall(common):
        return (found[-1],)
    return tuple(found.group() for tail in (middle, last) if (found := specials.search(tail)))[:1]


def _prompt(template: ChatTemplate, extra: dict[str, Any], parts: bool, specials: re.Pattern[str]) -> str:
    user = _surrounded(as_parts(USER) if parts else USER, mark(_Q))
    try:
        tails = []
        for prompt in (False, True):
            text, marks = take_marks(template.render([user], None, extra, prompt=prompt))
            tails.append(text[marks[-1][1] :] if marks else text)
    except Exception:  # it refuses a chat that ends with the user: turns then begin at their content
        return ""
    prompt = tails[1][len(_common(tails, specials)) :]
    if prompt:
        return prompt
    # Llama 2 has no generation prompt: ` [/INST]` ends the user's turn, and the answer follows with no header.
    reply = _surrounded(as_parts(REPLY) if parts else REPLY, mark(_A))
    text, marks = take_marks(template.render([user, reply], None, extra))
    header = text[marks[1][1] : marks[2][1]] if len(marks) == 4 else ""
    return tails[1] if header.startswith(tails[1]) and not header[len(tails[1]) :].strip() else ""


def _common(tails: list[str], specials: re.Pattern[str]) -> str:
    """Longest common beginning that cuts no special token."""
    shortest = min(tails, key=len)
    if all(tail.startswith(shortest) for tail in tails):
        return shortest
    split = [_pieces(tail, specials) for tail in tails]
    common = []
    for same in zip(*split, strict=False):
        if len(set(same)) > 1:
            break
        common.append(same[0])
    return "".join(common)


def _pieces(text: str, specials: re.Pattern[str]) -> list[str]:
    pieces, at = [], 0
    for found in specials.finditer(text):
        pieces += [text[at : found.start()], found.group()]
        at = found.end()
    return [*pieces, text[at:]]
