"""What a chat template writes before a turn of the model and behind it: prompts, and what stands between two turns.

History is never rendered anew: of a conversation that goes on, only what follows the last turn is taken from the
template, found as `locate.py` finds a loss mask, by marks around a stand-in for what the model said.

Runs inside the template process; pure.
"""

from __future__ import annotations

from typing import Any

from burnish.data.rendering.locate import difference, said
from burnish.data.rendering.marker import Anchors, Message, Refused, as_parts, refuse_forged
from burnish.data.rendering.probe import CALL, REPLY, TOOL, USER, tails
from burnish.data.rendering.template import MARK, ChatTemplate, mark, take_marks

_SAID, _HEARD = 2, 4
"""Marks around the stand-in for a sampled turn, and around what it was answered."""
_REPLY = "Two miles."
_OTHER = "give another with `data.renderer.chat_template_path`, or use an environment of one turn"


def ask(
    template: ChatTemplate,
    anchors: Anchors,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    extra: dict[str, Any],
) -> str:
    """The text that a server gives the model to answer `messages`.

    Raises:
        Refused: the template refuses them, or a message would forge a turn.
    """
    for index, message in enumerate(messages):
        refuse_forged({name: value for name, value in message.items() if name != "role"}, index, anchors.control)
    return _rendered(template, anchors, messages, tools, extra)


def between(
    template: ChatTemplate,
    anchors: Anchors,
    prompt: list[Message],
    turns: list[list[Message] | None],
    tools: list[dict[str, Any]] | None,
    extra: dict[str, Any],
) -> tuple[str, int]:
    """(what the template writes behind the last sampled turn, how much of it stands before the next content).

    User "2+2?", sampled, tool "4" in ChatML, with 11 characters before the "tool" header and 28 before the "4":

        ("<|im_end|>\\n<|im_start|>tool\\n4<|im_end|>\\n<|im_start|>assistant\\n", 28)

    Args:
        turns: what follows the prompt, None for a sampled turn; the last is what the environment answered it.

    Raises:
        Refused: the template refuses the conversation, or renders the sampled turns otherwise than they were sampled.
    """
    opening = _rendered(template, anchors, prompt, tools, extra)
    opened, thought = _thought(template, opening)

    def conversation(sampled: str, heard: tuple[str, str]) -> list[Message]:
        found = list(prompt)
        for number, turn in enumerate(turns):
            if turn is None:
                reply = sampled if number == len(turns) - 2 else _REPLY
                found.append({"role": "assistant", "content": thought + reply})
            else:
                around = heard if number == len(turns) - 1 else ("", "")
                found += [_answer(message, anchors, around) for message in turn]
        return found

    text = _rendered(template, anchors, conversation(_REPLY, ("", "")), tools, extra)
    expected = opening.removesuffix(opened) + thought + _REPLY
    if not _bare(text).startswith(_bare(expected)):
        changed = difference(expected, text)
        raise Refused(f"the chat template writes earlier turns otherwise than they were sampled: {changed}", _OTHER)
    signs = mark(_HEARD), mark(_HEARD + 1)
    for heard in (signs, ("", "")):  # some templates compare what tools say with something
        marked = conversation(mark(_SAID) + _REPLY + mark(_SAID + 1), heard)
        plain, marks = take_marks(_rendered(template, anchors, marked, tools, extra))
        places = [place for mark_id, place in marks if mark_id == _HEARD]
        ends = [place for mark_id, place in marks if mark_id == _SAID + 1]
        if plain != text or len(ends) != 1:
            continue
        if len(places) < sum(heard[0] in str(message.get("content")) for message in marked if heard[0]):
            roles = ", ".join(dict.fromkeys(message["role"] for message in turns[-1] or []))
            raise Refused(f"the chat template does not render what the environment answers as {roles}", _OTHER)
        return text[ends[0] :], (places[0] if places else len(text)) - ends[0]
    raise Refused("what follows a sampled turn cannot be located: marks around it change the text", _OTHER)


def probe_turns(template: ChatTemplate, anchors: Anchors) -> str:
    """Why no conversation of several turns can be led with this template; empty where one can."""
    reasons = []
    for role in ("tool", "user"):
        try:
            between(template, anchors, [USER], [None, [{"role": role, "content": "Far."}]], None, {})
        except Refused as refused:
            reasons.append(refused.reason)
    return reasons[0] if len(reasons) == 2 else ""


def stops(template: ChatTemplate, anchors: Anchors) -> list[str]:
    """What ends the last turn of a conversation, be it an answer or a call; where that is nothing (GLM), what does in
    the middle of one."""
    found = []
    for messages, tools in (([USER, REPLY], None), ([USER, CALL], [TOOL])):
        try:
            parts = [as_parts(message) for message in messages] if anchors.parts else messages
            _, last = tails(template, parts, tools, {})
        except Exception:  # a template without tool calls, or one that wants their result
            continue
        found += [end for end in anchors.ends if last is not None and end in last]
    return list(dict.fromkeys(found or anchors.ends))


def _rendered(
    template: ChatTemplate,
    anchors: Anchors,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    extra: dict[str, Any],
) -> str:
    if anchors.parts:
        messages = [as_parts(message) for message in messages]
    try:
        return template.render(messages, tools, extra, prompt=True)
    except Exception as error:
        raise Refused(
            f"the chat template refuses this conversation: {said(error)}",
            "change the conversation, or the template with `data.renderer.chat_template_path`",
        ) from error


def _thought(template: ChatTemplate, opening: str) -> tuple[str, str]:
    """(the tag of a thought that `opening` ends with, all of a thought as a model writes it in a turn): it thinks where
    the template knows how, and has not written already that nothing is thought."""
    closing = next((tag for tag in template.thought_tags if tag[1] == "/"), "")
    before = opening.rstrip()
    if not closing or before.endswith(closing):
        return "", ""
    opened = closing[0] + closing[2:]
    begun = opening[len(before) - len(opened) :] if before.endswith(opened) else ""
    return begun, f"{opened}\nMeasured once.\n{closing}\n\n"


def _answer(message: Message, anchors: Anchors, around: tuple[str, str]) -> Message:
    """A message of the environment, which may repeat what the policy spelled: it forges no turn and is no mark."""
    content = message["content"]
    if not isinstance(content, str):
        return message
    content = content.replace(MARK, "")
    for token in anchors.control:
        content = content.replace(token, f"{token[:2]} {token[2:]}")
    core = content.strip()
    if core and around[0]:
        at = content.index(core)
        content = content[:at] + around[0] + core + around[1] + content[at + len(core) :]
    return {**message, "content": content}


def _bare(text: str) -> str:
    return "".join(text.split())
